"""Adafactor of optax."""

import dataclasses

import optax

from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext, clipped
from train.optimizers.layerwise import each_layer, of_two_axes


@dataclasses.dataclass(frozen=True)
class Adafactor(OptimizerConfig):
    """Adam with a second moment made of row and column means.

        step = -lr (scale clip(g / sqrt(v)) + weight_decay p)

    scale is the root mean square of the tensor, so the learning rate is relative; the clip bounds
    the root mean square of the direction. Without momentum the state takes next to nothing: one
    number for each row and column. `optax.adafactor`.
    """

    learning_rate: float = 1e-2
    """Peak learning rate: the change of a tensor in a step, as a share of its size."""
    multiply_by_parameter_scale: bool = True
    """Without it the learning rate is absolute, and about AdamW's fits."""
    decay_rate: float = 0.8
    """v decays by 1 - t^-decay_rate at step t."""
    min_dim_size_to_factor: int = 128
    """Matrices whose shorter side is below this are not factored."""
    clipping_threshold: float = 1.0
    """Largest root mean square of a tensor's direction, 1 or more."""
    momentum: float = 0.0
    """Decay of an average of the steps, for 4 bytes a parameter; 0 turns it off."""
    eps: float = 1e-30
    """Added to the squared gradient."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation."""
        tx = optax.adafactor(
            context.schedule,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            decay_rate=self.decay_rate,
            multiply_by_parameter_scale=self.multiply_by_parameter_scale,
            clipping_threshold=self.clipping_threshold,
            momentum=self.momentum or None,
            # optax leaves the learning rate out of this decay
            weight_decay_rate=lambda count: self.weight_decay * context.schedule(count),
            eps=self.eps,
            weight_decay_mask=of_two_axes,
        )
        return clipped(each_layer(tx), context)
