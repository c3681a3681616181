"""Gradient descent of optax."""

import dataclasses

import optax

from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext, clipped


@dataclasses.dataclass(frozen=True)
class Sgd(OptimizerConfig):
    """Gradient descent with momentum.

        step = -lr m,  m <- momentum m + g

    The state takes 4 bytes a parameter. No weight decay. `optax.sgd`.
    """

    learning_rate: float = 0.1
    """Peak learning rate; it depends on the gradient's scale: tune it for each model."""
    momentum: float = 0.9
    """Decay of m; steps are 1 / (1 - momentum) times as long."""
    nesterov: bool = False
    """Take one step of momentum ahead."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation."""
        return clipped(optax.sgd(context.schedule, self.momentum, self.nesterov), context)
