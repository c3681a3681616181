"""Muon of optax."""

import dataclasses

import optax

from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext, clipped
from train.optimizers.layerwise import dimension_numbers, matrices


@dataclasses.dataclass(frozen=True)
class Muon(OptimizerConfig):
    """Orthogonalised momentum; vectors are updated by Adam.

        step = -lr (consistent_rms sqrt(longer side) U Vᵀ + weight_decay p),  m = U S Vᵀ

    m averages gradients, with Nesterov momentum. Every matrix is orthogonalised,
    embeddings included. The state takes 4 bytes a parameter. `optax.contrib.muon`.
    """

    learning_rate: float = 6e-4
    """Peak learning rate; AdamW's, up to a few times that."""
    beta: float = 0.95
    """Decay of m, which averages 1 / (1 - beta) steps."""
    consistent_rms: float = 0.2
    """Root mean square of a matrix's direction; .2 is about AdamW's."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation."""
        tx = optax.contrib.muon(
            context.schedule,
            beta=self.beta,
            consistent_rms=self.consistent_rms,
            weight_decay=self.weight_decay,
            weight_decay_mask=matrices,
            muon_weight_dimension_numbers=dimension_numbers,
        )
        return clipped(tx, context)
