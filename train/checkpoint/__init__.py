"""Saving a run, and starting from what was saved."""
