"""Rows of each task, as pure functions of the seed and the row's number."""
