"""Curvature-aware optimizers as composable optax gradient transformations.

Five words: an estimator makes one sample of the diagonal of the curvature, `hessian_estimate`
averages samples, `optax.ema` averages gradients, `clip_by_ratio` lets the two meet, and an alias
is a composition of these.
"""

from sophia_optax.alias import soaa, sophia_g, sophia_geometric, sophia_h, sophia_lite
from sophia_optax.curvature import Estimator, hutchinson
from sophia_optax.diagnostics import diagnostics
from sophia_optax.gauss_newton import gauss_newton_bartlett
from sophia_optax.gradient import (
    gradient_magnitude,
    squared_gradient,
    weighted_squared_gradient,
)
from sophia_optax.moments import CenteredMomentState, centered_second_moment, second_moment
from sophia_optax.ratio import ClipByRatioState, clip_by_ratio, floor, rms_floor, shift
from sophia_optax.region import TrustRegionState, trust_region
from sophia_optax.transform import HessianEstimateState, hessian_estimate

__all__ = [
    # optimizers
    "soaa",
    "sophia_g",
    "sophia_geometric",
    "sophia_h",
    "sophia_lite",
    # estimators: one sample of the diagonal of the curvature
    "Estimator",
    "gauss_newton_bartlett",
    "gradient_magnitude",
    "hutchinson",
    "squared_gradient",
    "weighted_squared_gradient",
    # transformations
    "CenteredMomentState",
    "ClipByRatioState",
    "HessianEstimateState",
    "TrustRegionState",
    "centered_second_moment",
    "clip_by_ratio",
    "floor",
    "hessian_estimate",
    "rms_floor",
    "second_moment",
    "shift",
    "trust_region",
    # what the state says
    "diagnostics",
]
