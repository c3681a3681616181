"""Optimizers of the command line: one config class for each, and the table of their names."""
