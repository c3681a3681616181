"""How momentum meets curvature."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax import _checks
from sophia_optax.curvature import widen
from sophia_optax.transform import refresh_due

ArrayLike = jax.typing.ArrayLike
Denominator = Callable[[jax.Array], jax.Array]


def floor(gamma: ArrayLike, eps: ArrayLike = 1e-12) -> Denominator:
    """The denominator of Sophia: max(gamma h, eps).

    Args:
      gamma: factor on h; larger means fewer clipped coordinates, and 0 a sign step everywhere.
      eps: floor, where curvature is small or negative: a sign step after clipping. At least the
        smallest normal float32 is used.

    Returns:
      A pure function of h.

    Raises:
      ValueError: an argument is negative.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 3, line 13.

    >>> import jax.numpy as jnp
    >>> print(floor(.5, .25)(jnp.array([4., 0., -4.])))
    [2.   0.25 0.25]
    """
    _checks.in_range("gamma", gamma, 0, float("inf"))
    _checks.in_range("eps", eps, 0, float("inf"))

    def denominator(h):
        return jnp.maximum(jnp.asarray(gamma, h.dtype) * h, _normal(eps, h.dtype))

    return denominator


def shift(eps: ArrayLike, rho: ArrayLike = 1.0) -> Denominator:
    """The denominator rho h + eps, for curvature that is never negative.

    Args:
      eps: shift, at least the smallest normal float32.
      rho: factor on h.

    Returns:
      A pure function of h.

    Raises:
      ValueError: an argument is negative.

    Source: the update of Sophia-Lite and of geometric SophiaG, m / (h + eps).

    >>> import jax.numpy as jnp
    >>> print(shift(.5)(jnp.array([2., 0.])))
    [2.5 0.5]
    """
    _checks.in_range("rho", rho, 0, float("inf"))
    _checks.in_range("eps", eps, 0, float("inf"))

    def denominator(h):
        return jnp.asarray(rho, h.dtype) * h + _normal(eps, h.dtype)

    return denominator


def _normal(eps: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """At least the smallest normal float32: what is smaller may be flushed to zero."""
    return jnp.maximum(jnp.asarray(eps, dtype), jnp.asarray(jnp.finfo(jnp.float32).tiny, dtype))


class ClipByRatioState(NamedTuple):
    """State of `clip_by_ratio`; the statistics are those of the last refresh."""

    momentum: Any
    curvature: Any
    clipped: Any  # float32 (): share of clipped coordinates among those above the floor
    floored: Any  # float32 (): share of coordinates at the floor, of all


def clip_by_ratio(
    momentum: optax.GradientTransformation,
    curvature: optax.GradientTransformation,
    *,
    denominator: Denominator,
    clip_threshold: ArrayLike | None = 1.0,
    two_sided: bool = True,
    statistics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum over curvature, bounded: clip(m / denominator(h), clip_threshold).

    Both transformations are fed the same incoming gradient.

    Args:
      momentum: gradients in, m out, such as `optax.ema(.9, debias=False, accumulator_dtype=None)`.
      curvature: gradients in, h out, such as `hessian_estimate(hutchinson())`.
      denominator: a pure function of h, such as `floor(gamma, eps)`.
      clip_threshold: bound on each coordinate, > 0; None is no bound.
      two_sided: bound from both sides; False only from above.
      statistics: take the clipped and floored fractions on refreshes of h. They cost a pass over
        m and h there, and with a dynamic `refresh` also a `lax.cond`.

    Extra arguments of `update`:
      **extra: passed on to both.

    Returns:
      A transformation whose output has the dtype of the incoming gradient; the ratio is computed
      in float32 at least. Its state holds both inner states and the statistics, read by
      `diagnostics`.

    Raises:
      ValueError: `clip_threshold` is not above 0.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 3, line 13.

    >>> import jax.numpy as jnp, optax
    >>> from sophia_optax import hessian_estimate, squared_gradient
    >>> tx = clip_by_ratio(
    ...     optax.ema(0., debias=False, accumulator_dtype=None),
    ...     hessian_estimate(squared_gradient(), update_interval=1),
    ...     denominator=floor(1., 1e-12))
    >>> g = jnp.array([.5, -4.])
    >>> u, state = tx.update(g, tx.init(g))
    >>> print(u, state.clipped)                      # g / max(g², eps) = (2, -1/4)
    [ 1.   -0.25] 0.5
    """
    if clip_threshold is not None:
        _checks.in_range("clip_threshold", clip_threshold, 0, float("inf"))
        if isinstance(clip_threshold, int | float | np.number) and clip_threshold == 0:
            raise ValueError("clip_threshold=0 stops all movement; None turns clipping off.")
    momentum = optax.with_extra_args_support(momentum)
    curvature = optax.with_extra_args_support(curvature)
    statistics = statistics and clip_threshold is not None

    def init(params):
        return ClipByRatioState(
            momentum=momentum.init(params),
            curvature=curvature.init(params),
            clipped=jnp.zeros([], jnp.float32) if statistics else (),
            floored=jnp.zeros([], jnp.float32) if statistics else (),
        )

    def update(updates, state, params=None, **extra):
        m, momentum_state = momentum.update(updates, state.momentum, params, **extra)
        h, curvature_state = curvature.update(updates, state.curvature, params, **extra)
        h = jax.tree.map(widen, h)  # of any curvature: zero over float16's floor would be NaN
        ratio = jax.tree.map(lambda m, h: m.astype(h.dtype) / denominator(h), m, h)

        def measure():
            return _fractions(ratio, h, denominator, clip_threshold, two_sided)

        measured = (state.clipped, state.floored)
        if statistics:
            due = refresh_due(extra.get("refresh"), extra.get("hessian"))
            measured = _at_refresh(due, curvature_state, measure, measured)
        ratio = jax.tree.map(lambda u: _clip(u, clip_threshold, two_sided), ratio)
        state = ClipByRatioState(momentum_state, curvature_state, *measured)
        return optax.tree.cast_like(ratio, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _clip(u: jax.Array, threshold: ArrayLike | None, two_sided: bool) -> jax.Array:
    if threshold is None:
        return u
    bound = jnp.asarray(threshold, u.dtype)
    return jnp.clip(u, -bound, bound) if two_sided else jnp.minimum(u, bound)


def _at_refresh(due: bool | jax.Array | None, curvature_state: Any, measure: Callable, old: Any):
    """`measure()` if h took a sample in this update, or does not say; else `old`."""
    age = getattr(curvature_state, "age", None)
    if due is False:
        return old
    if age is None:
        return measure()
    if due is True:  # the sample may still have been rejected
        return jax.tree.map(lambda new, old: jnp.where(age == 0, new, old), measure(), old)
    return jax.lax.cond(age == 0, measure, lambda: old)


def _fractions(ratio, h, denominator, threshold, two_sided) -> tuple[jax.Array, jax.Array]:
    """(clipped / live, floored / all); a coordinate is live if its curvature lifts it off zero's.

    On dead coordinates, such as unused embedding rows, being clipped or not means nothing.
    """

    def count(u, h):
        live = denominator(h) > denominator(jnp.zeros_like(h))
        hit = (jnp.abs(u) if two_sided else u) >= jnp.asarray(threshold, u.dtype)
        return jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in (live, live & hit)])

    counts = jax.tree.map(count, ratio, h)
    live, clipped = jax.tree.reduce(jnp.add, counts, jnp.zeros([2], jnp.float32))
    size = jnp.asarray(max(optax.tree.size(h), 1), jnp.float32)
    return clipped / jnp.maximum(live, 1), (size - live) / size
