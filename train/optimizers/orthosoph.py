"""OrthoSoph: momentum made orthogonal in blocks."""

import dataclasses
from typing import Literal

import sophia_optax
from train.optimizers.arguments import StateDtype, arguments_of
from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext, clip_first
from train.optimizers.layerwise import matrices


@dataclasses.dataclass(frozen=True)
class OrthoSoph(OptimizerConfig):
    """Momentum orthogonalised in blocks of rows; vectors go by Adam.

        step = -lr (scaled to rms: (C + ridge I)^(-1/2) n, + weight_decay p)

    n is the Nesterov momentum. C is n nᵀ for each block of block_size rows, which run along the
    shorter side of a matrix. With one block a matrix this is Muon. The state takes 2 bytes a
    parameter, for momentum in bfloat16. The paper's tiles:

        --optim.form tiles --optim.rms None --optim.eps 1e-8 --optim.b2 .99
        --optim.no-nesterov --optim.mu-dtype float32
    """

    learning_rate: float = 6e-4
    """Peak learning rate; AdamW's, up to a few times that."""
    b1: float = 0.95
    """Decay of the momentum, which averages 1 / (1 - b1) steps."""
    b2: float = 0.0
    """Decay of C; more than 0 costs block_size / longer side x 4 bytes a parameter."""
    eps: float = 1e-6
    """Ridge, a share of the norm of C with rows, absolute with tiles."""
    block_size: int = 128
    """Rows of a block; more is better, and costs operations in proportion."""
    update_interval: int = 1
    """Steps between inverse square roots, some ten products of blocks each."""
    form: Literal["rows", "tiles"] = "rows"
    """Whether a block of C serves whole rows, or one square tile of them as in the paper."""
    b2_vector: float = 0.95
    """Decay of the second moment of vectors."""
    rms: float | None = 0.2
    """Root mean square of a matrix's direction; .2 is about AdamW's, None leaves it."""
    nesterov: bool = True
    """Take the momentum one step ahead."""
    mu_dtype: StateDtype = "bfloat16"
    """Dtype of the momentum; bfloat16 rounds to nearest: changes under a 256th are lost."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation."""
        arguments = arguments_of(self, context)
        tx = sophia_optax.orthosoph(**arguments, block_mask=matrices)
        return BuiltOptimizer(clip_first(tx, context), renew_interval=self.update_interval)
