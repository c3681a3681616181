"""Statistics of `clip_by_ratio`: which coordinates are clipped, floored or not finite."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax.numerics import widen
from sophia_optax.sharding import parts_of
from sophia_optax.transforms.denominators import Denominator

ArrayLike = jax.typing.ArrayLike


def fractions(
    m: optax.Updates,
    h: optax.Updates,
    v: optax.Updates,
    sizes: Any,
    denominator: Denominator,
    bound: ArrayLike,
    two_sided: bool,
) -> tuple[jax.Array, jax.Array]:
    """(clipped / live, floored / all), from samples m, h and v of leaves with these sizes.

    A coordinate is live if its curvature raises its denominator above that of h = 0. All others,
    such as unused rows of an embedding, are floored, and whether they are clipped says nothing.
    """

    def count(m, h, v, size):
        d = denominator(h, v)
        live, u = d > denominator(jnp.zeros_like(h), v), m / d
        hit = (jnp.abs(u) if two_sided else u) >= jnp.asarray(bound, u.dtype)
        counts = jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in (live, live & hit)])
        return counts * jnp.float32(size / max(m.size, 1))

    counts = jax.tree.map(count, m, h, v, sizes)
    live, clipped = jax.tree.reduce(jnp.add, counts, jnp.zeros([2], jnp.float32))
    size = jnp.asarray(max(sum(jax.tree.leaves(sizes)), 1), jnp.float32)
    return clipped / jnp.maximum(live, 1), jnp.maximum(size - live, 0) / size


def every_nth(x: jax.Array, share: float) -> jax.Array:
    """About `share` of the coordinates: every n-th along each axis, n a power of 2.

    Strides grow on all axes alike, since rows may be tokens and columns may be channels. They stop
    at 64 positions per axis, so small leaves are kept whole. Each stride leaves a multiple of 8
    positions, so that every shard of 8, or of a divisor of 8, keeps its own: a slice x[:n] would
    move data between devices.
    """
    strides = [1] * x.ndim
    while math.prod(strides) * share <= 1 / 2:
        halves = [
            axis
            for axis, (n, stride) in enumerate(zip(x.shape, strides, strict=True))
            if n // stride >= 128 and n % (2 * stride * math.lcm(8, parts_of(x, axis))) == 0
        ]
        if not halves:
            break
        strides[min(halves, key=lambda axis: (strides[axis], -x.shape[axis]))] *= 2
    return jax.lax.slice(x, [0] * x.ndim, x.shape, strides)


def nonfinite_leaves(momentum_state: Any) -> jax.Array:
    """int32 (): leaves in the momentum's state that hold a NaN or an infinite number.

    The state is read because it is written to memory anyway. XLA on CPU fuses a sum into that
    pass; counting the coordinates would write an array.
    """
    leaves = [x for x in jax.tree.leaves(momentum_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    kept = [widen(jax.lax.optimization_barrier(x)) for x in leaves]  # else written once more
    spoilt = [~jnp.isfinite(jnp.sum(x - x)) for x in kept]
    return sum((x.astype(jnp.int32) for x in spoilt), jnp.zeros([], jnp.int32))


def at_refresh(
    due: jax.Array | bool | None, curvature_state: Any, measure: Callable[[], Any], old: Any
) -> Any:
    """`measure()` if h took a sample in this update, or if its state has no `age`; else `old`."""
    age = getattr(curvature_state, "age", None)
    if age is None:
        return measure()
    if due is True:  # a static refresh, whose sample may still have been rejected
        return jax.tree.map(lambda new, old: jnp.where(age == 0, new, old), measure(), old)
    return jax.lax.cond(age == 0, measure, lambda: old)
