"""Reports of a run: rows of metrics, a progress bar, figures, trackers, traces."""
