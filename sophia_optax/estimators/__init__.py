"""Estimators: one sample of curvature each, and how rows of a batch are sampled."""
