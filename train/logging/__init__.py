"""What a run reports: rows of metrics, a progress line, figures, trackers, traces."""
