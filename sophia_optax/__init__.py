"""Curvature-aware optimizers as composable optax gradient transformations.

An estimator makes one sample of the diagonal of the curvature, `hessian_estimate` averages samples,
`ema` averages gradients, `clip_by_ratio` divides one average by the other and bounds the ratio, and
`trust_region` says how far a step goes. Every optimizer is a composition of these.
"""

from sophia_optax.diagnostics import diagnostics
from sophia_optax.estimators.base import Estimator
from sophia_optax.estimators.chunked_logits import LinearLogits, softmax_cross_entropy
from sophia_optax.estimators.gauss_newton import gauss_newton_bartlett
from sophia_optax.estimators.gradient import (
    gradient_magnitude,
    squared_gradient,
    weighted_squared_gradient,
)
from sophia_optax.estimators.hutchinson import hutchinson
from sophia_optax.estimators.value_and_grad import value_grad_and_hessian
from sophia_optax.optimizers.orthosoph import orthosoph
from sophia_optax.optimizers.soaa import soaa
from sophia_optax.optimizers.sophia import sophia_g, sophia_h
from sophia_optax.optimizers.sophia_geometric import sophia_geometric
from sophia_optax.optimizers.sophia_lite import sophia_lite
from sophia_optax.transforms.blocks import ScaleByBlocksState, scale_by_blocks
from sophia_optax.transforms.centered_moment import CenteredMomentState, centered_second_moment
from sophia_optax.transforms.clip_by_ratio import ClipByRatioState, clip_by_ratio
from sophia_optax.transforms.denominators import floor, rms_floor, shift
from sophia_optax.transforms.hessian_estimate import HessianEstimateState, hessian_estimate
from sophia_optax.transforms.moments import ema, first_moment, second_moment
from sophia_optax.transforms.predicted_reduction import PredictedReduction
from sophia_optax.transforms.trust_region import TrustRegionState, trust_region

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
    "PredictedReduction",
    "ScaleByBlocksState",
    "TrustRegionState",
    "centered_second_moment",
    "clip_by_ratio",
    "ema",
    "floor",
    "hessian_estimate",
    "rms_floor",
    "scale_by_blocks",
    "second_moment",
    "shift",
    "trust_region",
    # scalars from a state
    "diagnostics",
    # deprecated names
    "first_moment",
]
