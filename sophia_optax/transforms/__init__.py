"""Gradient transformations, the parts that optimizers are composed of."""
