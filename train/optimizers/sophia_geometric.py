"""Sophia with weighted squares of the gradient for curvature."""

import dataclasses

import sophia_optax
from train.optimizers.arguments import StateDtype, arguments_of
from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext


@dataclasses.dataclass(frozen=True)
class SophiaGeometric(OptimizerConfig):
    """Momentum over squared gradients / (1 + their norm), clipped.

        step = -lr (clip(m / (rho h + eps)) + weight_decay p)

    m averages gradients, h the weighted squares. Squares of small gradients are far smaller than
    gradients, so nearly every coordinate is clipped: in effect this is the sign of m, and wants
    a rate near Lion's. The state takes 8 bytes a parameter.
    """

    learning_rate: float = 1e-4
    """Peak learning rate: the step of a clipped coordinate; Lion's is a start."""
    b1: float = 0.9
    """Decay of m, which averages 1 / (1 - b1) steps; short runs with small batches want .8."""
    b2: float = 0.99
    """Decay of h."""
    eps: float = 1e-8
    """Added to rho h; the paper gives none."""
    rho: float = 1.0
    """Factor on h; powers of ten above 1 clip less. The paper lists .04 and does not use it."""
    clip_threshold: float = 1.0
    """Bound on each coordinate of the step, in learning rates."""
    two_sided: bool = True
    """Bound both signs; as printed, large steps one way are not bounded."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""
    debias_momentum: bool = False
    """Correct m for its start at 0; the paper does not."""
    debias_hessian: bool = False
    """Correct h for its start at 0; the paper does not."""
    mu_dtype: StateDtype = "float32"
    """Dtype of m; bfloat16 rounds to nearest: changes under a 256th of m are lost."""
    hessian_dtype: StateDtype = "float32"
    """Dtype of h; bfloat16 is rounded stochastically, and keeps the mean."""
    statistics: bool = False
    """Measure win_rate, clipped_fraction and floored_fraction at each step, on a 64th of the
    coordinates."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation, which clips the gradient by itself."""
        arguments = arguments_of(self, context)
        norm = context.max_grad_norm
        tx = sophia_optax.sophia_geometric(**arguments, seed=context.seed, max_norm=norm)
        return BuiltOptimizer(tx)
