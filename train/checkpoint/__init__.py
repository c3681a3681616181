"""Checkpoints: saving a run, restoring it, and starting from another one."""
