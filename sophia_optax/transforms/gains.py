"""Factors on the curvature of `clip_by_ratio`, each computed from the whole trees (m, h)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from sophia_optax.numerics import widest
from sophia_optax.transforms.predicted_reduction import inner_product

ArrayLike = jax.typing.ArrayLike
Gain = Callable[[optax.Updates, optax.Updates], jax.Array]


def ratio_of_sums(eps: ArrayLike) -> Gain:
    """SOAA's factor on s (algorithm 1, line 8): 1 + Σ m² / Σ (s + eps)."""

    def gain(m, s):
        dtype = widest(s)
        size = jnp.asarray(max(optax.tree.size(s), 1), dtype)
        total = jnp.asarray(optax.tree.sum(s), dtype)
        return 1 + inner_product(m, m, dtype) / (total + size * jnp.asarray(eps, dtype))

    return gain


def sum_of_ratios(eps: ArrayLike) -> Gain:
    """Tadam's factor on v: 1 + Σ m² / (v + eps)."""

    def gain(m, v):
        scaled = jax.tree.map(lambda m, v: m / (v + jnp.asarray(eps, v.dtype)), m, v)
        return 1 + inner_product(m, scaled, widest(v))

    return gain
