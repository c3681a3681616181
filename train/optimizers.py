"""The optimizers of the command line: each a config that knows how to make its transformation.

Every one of them takes the same schedule and the same mask (weight decay on matrices, none on
vectors and norms), so that a comparison compares optimizers.
"""

import dataclasses
from typing import Any

import jax
import optax

import sophia_optax


def matrices(params: Any) -> Any:
    """The default weight-decay mask: matrices yes, vectors and norms no."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


@dataclasses.dataclass(frozen=True)
class _Sophia:
    """What Sophia-G and Sophia-H share: all but the estimator."""

    learning_rate: float = 6e-4
    """Peak learning rate: the step of a clipped coordinate."""
    b1: float = 0.965
    """Decay of the momentum. Short runs with small batches want .8."""
    b2: float = 0.99
    """Decay of the curvature average, per refresh."""
    gamma: float = 0.05
    """Factor on the curvature; raise it if the win rate stays under .1."""
    eps: float = 1e-12
    """Floor of the denominator."""
    clip_threshold: float = 1.0
    """Bound on each coordinate of the step, in learning rates."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices."""
    update_interval: int = 10
    """Steps between curvature samples."""
    batch_fraction: float = 1.0
    """Share of the batch that curvature is sampled from."""
    debias_momentum: bool = True
    """Correct the bias of the momentum (the paper does not)."""
    debias_hessian: bool = True
    """Correct the bias of the curvature average (the paper does not)."""

    def _make(self, learning_rate: optax.Schedule, seed: int, estimator: sophia_optax.Estimator):
        return sophia_optax.sophia_h(
            learning_rate,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            gamma=self.gamma,
            clip_threshold=self.clip_threshold,
            weight_decay=self.weight_decay,
            weight_decay_mask=matrices,
            update_interval=self.update_interval,
            debias_momentum=self.debias_momentum,
            debias_hessian=self.debias_hessian,
            seed=seed,
            estimator=estimator,
        )


@dataclasses.dataclass(frozen=True)
class SophiaG(_Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimate of curvature."""

    groups: int = 1
    """Sets of rows that are squared apart: less variance at equal cost; must divide the rows."""

    def make(self, learning_rate: optax.Schedule, *, shards: int, seed: int):
        """The transformation; `shards` groups are sampled side by side where they divide."""
        estimator = sophia_optax.gauss_newton_bartlett(
            groups=self.groups,
            batch_fraction=self.batch_fraction,
            shards=shards if self.groups % shards == 0 else 1,
        )
        return self._make(learning_rate, seed, estimator)


@dataclasses.dataclass(frozen=True)
class SophiaH(_Sophia):
    """Sophia with Hutchinson's estimate of curvature."""

    gamma: float = 0.01
    """Factor on the curvature; raise it if the win rate stays under .1."""

    def make(self, learning_rate: optax.Schedule, *, shards: int, seed: int):
        """The transformation."""
        estimator = sophia_optax.hutchinson(batch_fraction=self.batch_fraction)
        return self._make(learning_rate, seed, estimator)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """optax.adamw."""

    learning_rate: float = 6e-4
    """Peak learning rate."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        return optax.adamw(
            learning_rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=matrices
        )


@dataclasses.dataclass(frozen=True)
class Lion:
    """optax.lion."""

    learning_rate: float = 1e-4
    """Peak learning rate: the step of every coordinate."""
    b1: float = 0.95
    """Share of the momentum in the sign."""
    b2: float = 0.98
    """Decay of the momentum."""
    weight_decay: float = 0.2
    """Decoupled decay of matrices."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        return optax.lion(
            learning_rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=matrices
        )


@dataclasses.dataclass(frozen=True)
class Muon:
    """optax.contrib.muon: matrices orthogonalised, vectors by Adam."""

    learning_rate: float = 6e-4
    """Peak learning rate, comparable to AdamW's (`consistent_rms`)."""
    beta: float = 0.95
    """Decay of the momentum."""
    consistent_rms: float = 0.2
    """Root mean square that the orthogonalised step is scaled to, about AdamW's."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        return optax.contrib.muon(
            learning_rate,
            beta=self.beta,
            consistent_rms=self.consistent_rms,
            weight_decay=self.weight_decay,
            weight_decay_mask=matrices,
        )


Optimizer = SophiaG | SophiaH | AdamW | Lion | Muon

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sophia-g": SophiaG,
    "sophia-h": SophiaH,
    "adamw": AdamW,
    "lion": Lion,
    "muon": Muon,
}


def name_of(optimizer: Optimizer) -> str:
    """The optimizer's name on the command line."""
    return next(name for name, kind in OPTIMIZERS.items() if isinstance(optimizer, kind))
