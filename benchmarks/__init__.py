"""Scripts that print the tables of README.md and docs/results.md. Run them from the clone."""
