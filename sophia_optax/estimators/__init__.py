"""Estimators of curvature: each call returns one sample of diag H."""
