"""Adam and AdamW of optax."""

import dataclasses

import optax

from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext, clipped
from train.optimizers.layerwise import matrices


@dataclasses.dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay: the baseline.

        step = -lr (m / (sqrt(v) + eps) + weight_decay p)

    m averages gradients, v their squares, both corrected for their bias. The state takes 8 bytes
    a parameter. Tune the learning rate first, then b1 or the decay. `optax.adamw`.
    """

    learning_rate: float = 6e-4
    """Peak learning rate: about the change of each parameter in a step."""
    b1: float = 0.9
    """Decay of m, which averages 1 / (1 - b1) steps; short runs want .8."""
    b2: float = 0.95
    """Decay of v; .95 to .99 for language models, more recovers slowly from spikes."""
    eps: float = 1e-8
    """Added to the denominator; raise it if rarely used parameters jump."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation."""
        tx = optax.adamw(
            context.schedule,
            self.b1,
            self.b2,
            self.eps,
            weight_decay=self.weight_decay,
            mask=matrices,
        )
        return clipped(tx, context)


@dataclasses.dataclass(frozen=True)
class Adam(OptimizerConfig):
    """Adam without weight decay.

        step = -lr m / (sqrt(v) + eps)

    m averages gradients, v their squares, both corrected for their bias. The state takes 8 bytes
    a parameter. `optax.adam`.
    """

    learning_rate: float = 6e-4
    """Peak learning rate; AdamW's fits."""
    b1: float = 0.9
    """Decay of m, which averages 1 / (1 - b1) steps; short runs want .8."""
    b2: float = 0.95
    """Decay of v; .95 to .99 for language models, more recovers slowly from spikes."""
    eps: float = 1e-8
    """Added to the denominator; raise it if rarely used parameters jump."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation."""
        return clipped(optax.adam(context.schedule, self.b1, self.b2, self.eps), context)
