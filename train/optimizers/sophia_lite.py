"""Sophia with the mean magnitude of the gradient for curvature."""

import dataclasses

import sophia_optax
from train.optimizers.arguments import StateDtype, arguments_of
from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext, clip_first


@dataclasses.dataclass(frozen=True)
class SophiaLite(OptimizerConfig):
    """Momentum over the mean magnitude of the gradient, clipped.

        step = -lr (clip(m / (h + eps)) + weight_decay p)

    m averages gradients, h their magnitudes: an Adam of first powers, which needs no curvature
    sample. The state takes 8 bytes a parameter, as AdamW's. The paper's exact form:

        --optim.update-interval 20 --optim.weight-decay 0
        --optim.no-debias-momentum --optim.no-debias-hessian
    """

    learning_rate: float = 6e-4
    """Peak learning rate: the step of a clipped coordinate; AdamW's is a start."""
    b1: float = 0.9
    """Decay of m, which averages 1 / (1 - b1) steps; short runs with small batches want .8."""
    b2: float = 0.95
    """Decay of h at each sample."""
    eps: float = 1e-8
    """Added to h."""
    clip_threshold: float = 1.0
    """Bound on each coordinate of the step, in learning rates."""
    update_interval: int = 1
    """Steps between samples of the magnitude, which are free; the paper's is 20."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""
    debias_momentum: bool = True
    """Correct m for its start at 0; the paper does not."""
    debias_hessian: bool = True
    """Correct h for its start at 0; the paper does not, and clips most at first."""
    mu_dtype: StateDtype = "float32"
    """Dtype of m; bfloat16 rounds to nearest: changes under a 256th of m are lost."""
    hessian_dtype: StateDtype = "float32"
    """Dtype of h; bfloat16 is rounded stochastically, and keeps the mean."""
    statistics: bool = False
    """Measure win_rate, clipped_fraction and floored_fraction at each sample, on a 64th of the
    coordinates."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation."""
        arguments = arguments_of(self, context)
        tx = sophia_optax.sophia_lite(**arguments, seed=context.seed)
        return BuiltOptimizer(clip_first(tx, context), refresh_interval=self.update_interval)
