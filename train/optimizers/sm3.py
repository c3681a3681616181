"""SM3 of optax."""

import dataclasses

import optax

from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext, clipped
from train.optimizers.layerwise import each_layer


@dataclasses.dataclass(frozen=True)
class Sm3(OptimizerConfig):
    """Adagrad with one number for each row and each column.

        step = -lr m,  m the average of g / sqrt(v + eps)

    v is the least of the row's and the column's number, each the largest sum of squares so far.
    With b2 = 1 sums only grow, and steps shrink on top of the schedule. The state takes 4 bytes
    a parameter, for m. No weight decay. `optax.scale_by_sm3` (`optax.sm3` takes no schedule).
    """

    learning_rate: float = 0.1
    """Peak learning rate; some ten times Adam's, since v is a sum of all squares."""
    momentum: float = 0.9
    """Decay of m, which averages 1 / (1 - momentum) steps."""
    b2: float = 1.0
    """Decay of the squares; 1, the paper's, forgets none, .99 follows the gradient."""
    eps: float = 1e-8
    """Added to v, under the root."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation."""
        tx = optax.chain(  # optax.sm3 takes no schedule
            each_layer(optax.scale_by_sm3(self.momentum, self.b2, self.eps)),
            optax.scale_by_learning_rate(context.schedule),
        )
        return clipped(tx, context)
