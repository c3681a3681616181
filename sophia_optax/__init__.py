"""Curvature-aware optimizers as composable optax gradient transformations.

Five words: an estimator makes one sample of the diagonal of the curvature, `hessian_estimate`
averages samples, `first_moment` averages gradients, `clip_by_ratio` lets the two meet, and an alias
is a composition of these.
"""

from sophia_optax.alias import (
    orthosoph,
    soaa,
    sophia_g,
    sophia_geometric,
    sophia_h,
    sophia_lite,
)
from sophia_optax.blocks import ScaleByBlocksState, scale_by_blocks
from sophia_optax.curvature import Estimator
from sophia_optax.diagnostics import diagnostics
from sophia_optax.gauss_newton import gauss_newton_bartlett
from sophia_optax.gradient import (
    gradient_magnitude,
    squared_gradient,
    weighted_squared_gradient,
)
from sophia_optax.hessian import hutchinson
from sophia_optax.linear import LinearLogits, softmax_cross_entropy
from sophia_optax.moments import (
    CenteredMomentState,
    centered_second_moment,
    first_moment,
    second_moment,
)
from sophia_optax.ratio import ClipByRatioState, clip_by_ratio, floor, rms_floor, shift
from sophia_optax.region import TrustRegionState, trust_region
from sophia_optax.shared import value_grad_and_hessian
from sophia_optax.transform import HessianEstimateState, hessian_estimate

__version__ = "0.1.0"

__all__ = [
    # optimizers
    "orthosoph",
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
    "value_grad_and_hessian",
    "weighted_squared_gradient",
    # logits over a large vocabulary, chunk by chunk
    "LinearLogits",
    "softmax_cross_entropy",
    # transformations
    "CenteredMomentState",
    "ClipByRatioState",
    "HessianEstimateState",
    "ScaleByBlocksState",
    "TrustRegionState",
    "centered_second_moment",
    "clip_by_ratio",
    "first_moment",
    "floor",
    "hessian_estimate",
    "rms_floor",
    "scale_by_blocks",
    "second_moment",
    "shift",
    "trust_region",
    # what the state says
    "diagnostics",
]
