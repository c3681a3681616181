"""GaLore of optax."""

import dataclasses

import optax

from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext, clipped
from train.optimizers.layerwise import each_layer, of_two_axes


@dataclasses.dataclass(frozen=True)
class GaLore(OptimizerConfig):
    """Adam on gradients projected to a low rank.

        step = -lr (scale P adam(Pᵀ g) + weight_decay p)

    P holds the first `rank` singular vectors of a gradient, renewed every update_proj_gap steps.
    The state of an n x m matrix, n <= m, takes 4 rank (2 n + m) bytes, so set the rank to half the
    width at most; on a mesh every device holds it whole. Embeddings are projected too, which the
    paper's code does not do; vectors go by Adam. `optax.contrib.galore`.
    """

    learning_rate: float = 1e-2
    """Peak learning rate; for matrices it is times `scale`."""
    rank: int = 128
    """Directions kept of each matrix; the paper takes a quarter to half of the width."""
    update_proj_gap: int = 200
    """Steps between projections, each a decomposition of every matrix."""
    scale: float = 0.25
    """Factor on the direction of matrices, the paper's alpha."""
    b1: float = 0.9
    """Decay of Adam's first moment, not reset by a new projection."""
    b2: float = 0.999
    """Decay of Adam's second moment, not reset by a new projection."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation."""
        tx = optax.contrib.galore(
            context.schedule,
            rank=self.rank,
            update_proj_gap=self.update_proj_gap,
            scale=self.scale,
            base_optimizer=optax.scale_by_adam(self.b1, self.b2, self.eps),
            weight_decay=self.weight_decay,
            mask=of_two_axes,
        )
        return clipped(each_layer(tx), context)
