"""Curvature-aware optimizers as composable optax gradient transformations.

Five words: an estimator makes one sample of the diagonal of the curvature, `hessian_estimate`
averages samples, `optax.ema` averages gradients, `clip_by_ratio` lets the two meet, and an alias
is a composition of these.
"""

from sophia_optax.alias import sophia_g, sophia_h
from sophia_optax.curvature import Estimator, hutchinson, squared_gradient
from sophia_optax.diagnostics import diagnostics
from sophia_optax.gauss_newton import gauss_newton_bartlett
from sophia_optax.ratio import ClipByRatioState, clip_by_ratio, floor, shift
from sophia_optax.transform import HessianEstimateState, hessian_estimate

__all__ = [
    # optimizers
    "sophia_g",
    "sophia_h",
    # estimators: one sample of the diagonal of the curvature
    "Estimator",
    "gauss_newton_bartlett",
    "hutchinson",
    "squared_gradient",
    # transformations
    "ClipByRatioState",
    "HessianEstimateState",
    "clip_by_ratio",
    "floor",
    "hessian_estimate",
    "shift",
    # what the state says
    "diagnostics",
]
