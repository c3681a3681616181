"""Optimizers: one file for each, with its docstring and its composition of transformations."""
