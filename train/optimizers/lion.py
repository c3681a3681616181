"""Lion of optax."""

import dataclasses

import optax

from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext, clipped
from train.optimizers.layerwise import matrices


@dataclasses.dataclass(frozen=True)
class Lion(OptimizerConfig):
    """The sign of a momentum.

        step = -lr (sign(b1 m + (1 - b1) g) + weight_decay p)

    m averages gradients. Every parameter moves by the learning rate in every step, so the rate is
    a third to a tenth of AdamW's, and the decay larger. The state takes 4 bytes a parameter.
    `optax.lion`.
    """

    learning_rate: float = 1e-4
    """Peak learning rate: the change of every parameter in a step."""
    b1: float = 0.95
    """Share of the momentum, as against the gradient, in the sign."""
    b2: float = 0.98
    """Decay of m, which averages 1 / (1 - b2) steps; short runs want .9."""
    weight_decay: float = 0.2
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation."""
        tx = optax.lion(
            context.schedule, self.b1, self.b2, weight_decay=self.weight_decay, mask=matrices
        )
        return clipped(tx, context)
