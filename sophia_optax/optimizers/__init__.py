"""Optimizers, each one sentence of composition."""
