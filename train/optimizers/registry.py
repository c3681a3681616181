"""The optimizers of the command line: each a config that knows how to make its transformation.

Ours are here and in `sophia`, optax's in `baselines`. All take the same schedule, and weight
decay on matrices alone, so that a comparison compares optimizers.
"""

import dataclasses
from typing import Literal

import optax

import sophia_optax
from train.optimizers.baselines import Adafactor, Adam, AdamW, GaLore, Lion, Muon, Sgd, Sm3
from train.optimizers.layerwise import matrices
from train.optimizers.sophia import SophiaG, SophiaH, StateDtype, arguments_of


@dataclasses.dataclass(frozen=True)
class SophiaLite:
    """Momentum over the mean magnitude of the gradient, clipped.

        step = -lr (clip(m / (h + eps)) + weight_decay p)

    m averages gradients, h their magnitudes: an Adam of first powers, which needs no curvature
    sample. The state takes 8 bytes a parameter, as AdamW's. The paper's letter:

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
    """Measure win_rate and its kin at each sample, on a 64th of the coordinates."""

    def make(self, learning_rate: optax.Schedule, *, seed: int, **unused):
        """The transformation."""
        arguments = arguments_of(dataclasses.asdict(self), learning_rate)
        return sophia_optax.sophia_lite(**arguments, seed=seed)


@dataclasses.dataclass(frozen=True)
class SophiaGeometric:
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
    """Factor on h; powers of ten more clip less. The paper lists .04 and does not use it."""
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
    """Measure win_rate and its kin at each step, on a 64th of the coordinates."""

    def make(
        self, learning_rate: optax.Schedule, *, seed: int, max_norm: float | None = None, **unused
    ):
        """The transformation, after a clip of the gradient by its global norm."""
        arguments = arguments_of(dataclasses.asdict(self), learning_rate)
        return sophia_optax.sophia_geometric(**arguments, seed=seed, max_norm=max_norm)


@dataclasses.dataclass(frozen=True)
class OrthoSoph:
    """Momentum orthogonalised in blocks of rows; vectors go by Adam.

        step = -lr (scaled to rms: (C + ridge I)^(-1/2) n, + weight_decay p)

    n is the momentum a step ahead, C the products n nᵀ of each block_size rows of a matrix, the
    shorter side being the rows; one block a matrix is Muon. The state takes 2 bytes a parameter,
    the momentum in bfloat16. The paper's tiles:

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
    b2_numbers: float = 0.95
    """Decay of the second moment of vectors."""
    rms: float | None = 0.2
    """Root mean square of a matrix's direction; .2 is about AdamW's, None leaves it."""
    nesterov: bool = True
    """Take the momentum one step ahead."""
    mu_dtype: StateDtype = "bfloat16"
    """Dtype of the momentum; bfloat16 rounds to nearest: changes under a 256th are lost."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        arguments = arguments_of(dataclasses.asdict(self), learning_rate)
        return sophia_optax.orthosoph(**arguments, block_mask=matrices)


@dataclasses.dataclass(frozen=True)
class Soaa:
    """Adam or a Newton step, the shorter, in a trust region that follows the loss.

        step = -lr (r m / (max(r F, sqrt(v)) + eps) + weight_decay p)

    m averages gradients, v their squares, F is v times a factor of the whole tree, and the radius
    r grows while steps lower the loss as predicted. At the gradients of language models sqrt(v) is
    the larger: this is Adam times r. The state takes 8 bytes a parameter, as AdamW's.
    """

    learning_rate: float = 6e-4
    """Peak learning rate; AdamW's is a start, r multiplies it by .75 to 2."""
    b1: float = 0.9
    """Decay of m, which averages 1 / (1 - b1) steps; short runs with small batches want .8."""
    b2: float = 0.999
    """Decay of v."""
    gamma: float = 0.25
    """The bounds of r go from [1, 2] to [1 - gamma, 1 + gamma] over the run."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""
    rule: Literal["soaa", "tadam"] = "soaa"
    """Rule of the radius: as printed, or its parent's, for one more number a parameter."""
    mu_dtype: StateDtype = "float32"
    """Dtype of m; bfloat16 rounds to nearest: changes under a 256th of m are lost."""
    hessian_dtype: StateDtype = "float32"
    """Dtype of v; bfloat16 is rounded stochastically, and keeps the mean."""

    def make(self, learning_rate: optax.Schedule, *, total_steps: int, **unused):
        """The transformation; the bounds of its radius close in over `total_steps`."""
        arguments = arguments_of(dataclasses.asdict(self), learning_rate)
        return sophia_optax.soaa(**arguments, total_steps=total_steps)


Optimizer = (
    SophiaG
    | SophiaH
    | SophiaLite
    | SophiaGeometric
    | OrthoSoph
    | Soaa
    | AdamW
    | Adam
    | Lion
    | Sm3
    | Adafactor
    | Muon
    | GaLore
    | Sgd
)

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sophia-g": SophiaG,
    "sophia-h": SophiaH,
    "sophia-lite": SophiaLite,
    "sophia-geometric": SophiaGeometric,
    "orthosoph": OrthoSoph,
    "soaa": Soaa,
    "adamw": AdamW,
    "adam": Adam,
    "lion": Lion,
    "sm3": Sm3,
    "adafactor": Adafactor,
    "muon": Muon,
    "galore": GaLore,
    "sgd": Sgd,
}


def name_of(optimizer: Optimizer) -> str:
    """The optimizer's name on the command line."""
    return next(name for name, kind in OPTIMIZERS.items() if isinstance(optimizer, kind))


def refresh_due(optimizer: Optimizer, step: int) -> bool | None:
    """Whether the program of a step renews curvature: static, so that the other has no trace of it.

    None, for one program that serves all steps, without an interval or where it is 1 or spread:
    the transformation then decides by itself. What is not finite in a sample that it makes it
    refuses by coordinate, which moves 4 bytes a parameter less than the test of a whole sample.
    """
    interval = getattr(optimizer, "update_interval", 1) // getattr(optimizer, "slices", 1)
    return None if interval == 1 else step % interval == 0
