"""How momentum meets curvature."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.numerics import cast_to_step, widen, widest
from sophia_optax.sharding import parts_of, varying_like
from sophia_optax.transforms.hessian_estimate import refresh_due
from sophia_optax.transforms.holes import none_left_alone

ArrayLike = jax.typing.ArrayLike
Denominator = Callable[[jax.Array, jax.Array], jax.Array]
"""A pure function of the leaves (h, v): curvature, and the second moment of the gradient."""


def floor(gamma: ArrayLike, eps: ArrayLike = 1e-12) -> Denominator:
    """The denominator of Sophia: max(gamma h, eps).

    Args:
      gamma: factor on h; larger means fewer clipped coordinates, and 0 a sign step everywhere.
      eps: floor, where curvature is small or negative: a sign step after clipping. At least the
        smallest normal float32 is used.

    Returns:
      A pure function of h; v is not read.

    Raises:
      ValueError: an argument is negative.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 3, line 13.

    >>> import jax.numpy as jnp
    >>> print(floor(.5, .25)(jnp.array([4., 0., -4.])))
    [2.   0.25 0.25]
    """
    checks.in_range("gamma", gamma, 0, float("inf"), open_high=True)
    checks.in_range("eps", eps, 0, float("inf"), open_high=True)

    def denominator(h, v=None):
        del v
        return jnp.maximum(jnp.asarray(gamma, h.dtype) * h, _normal(eps, h.dtype))

    return denominator


def shift(eps: ArrayLike, rho: ArrayLike = 1.0) -> Denominator:
    """The denominator rho h + eps, for curvature that is never negative.

    Args:
      eps: shift, at least the smallest normal float32.
      rho: factor on h.

    Returns:
      A pure function of h; v is not read.

    Raises:
      ValueError: an argument is negative.

    Source: the update of Sophia-Lite and of geometric SophiaG, m / (h + eps).

    >>> import jax.numpy as jnp
    >>> print(shift(.5)(jnp.array([2., 0.])))
    [2.5 0.5]
    """
    checks.in_range("rho", rho, 0, float("inf"), open_high=True)
    checks.in_range("eps", eps, 0, float("inf"), open_high=True)

    def denominator(h, v=None):
        del v
        return jnp.asarray(rho, h.dtype) * h + _normal(eps, h.dtype)

    return denominator


def rms_floor(gamma: ArrayLike = 1.0, eps: ArrayLike = 1e-8) -> Denominator:
    """The denominator max(gamma h, sqrt(v)) + eps: Adam's where curvature is small.

    Where `floor` leaves a sign step, this leaves Adam's, m / sqrt(v).

    Args:
      gamma: factor on h; 0 is Adam everywhere.
      eps: shift, at least the smallest normal float32.

    Returns:
      A pure function of h and of v, the second moment of the gradient (`clip_by_ratio`'s
      `second_moment`; h itself where it has none, as in SOAA).

    Raises:
      ValueError: an argument is negative.

    Source: SOAA, algorithm 1, lines 9 and 10, with any curvature in the place of its F.

    >>> import jax.numpy as jnp
    >>> print(rms_floor(.5, .25)(jnp.array([8., 2., -4.]), jnp.array([4., 4., 4.])))
    [4.25 2.25 2.25]
    """
    checks.in_range("gamma", gamma, 0, float("inf"), open_high=True)
    checks.in_range("eps", eps, 0, float("inf"), open_high=True)

    def denominator(h, v):
        largest = jnp.maximum(jnp.asarray(gamma, h.dtype) * h, jnp.sqrt(v).astype(h.dtype))
        return largest + _normal(eps, h.dtype)

    return denominator


def _normal(eps: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """At least the smallest normal float32: what is smaller may be flushed to zero."""
    return jnp.maximum(jnp.asarray(eps, dtype), jnp.asarray(jnp.finfo(jnp.float32).tiny, dtype))


class ClipByRatioState(NamedTuple):
    """State of `clip_by_ratio`; the statistics are those of the last refresh.

    >>> import jax.numpy as jnp, optax
    >>> from sophia_optax import sophia_h
    >>> state = optax.tree.get(sophia_h(1e-3).init(jnp.zeros(2)), "ClipByRatioState")
    >>> print(state.momentum.ema, state.curvature.h)
    [0. 0.] [0. 0.]
    """

    momentum: Any  # state of `momentum`
    curvature: Any  # state of `curvature`
    second_moment: Any  # state of `second_moment`; empty where there is none
    linear: jax.Array  # float32 (): Σ m u, the first-order gain of a step u, if a radius was given
    quadratic: jax.Array  # float32 (): Σ h u², its curvature
    clipped: Any  # float32 (): share of clipped coordinates among those above the floor
    floored: Any  # float32 (): share of coordinates at the floor, of all; 1 before a refresh
    nonfinite: Any  # int32 (): leaves in the state of `momentum` with numbers that are not finite


def clip_by_ratio(
    momentum: optax.GradientTransformation,
    curvature: optax.GradientTransformation,
    *,
    denominator: Denominator,
    second_moment: optax.GradientTransformation | None = None,
    gain: Callable[[optax.Updates, optax.Updates], jax.Array] | None = None,
    clip_threshold: ArrayLike | None = 1.0,
    two_sided: bool = True,
    statistics: bool = True,
    statistics_fraction: float = 1 / 64,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum over curvature, bounded: u = clip(m / denominator(h, v), clip_threshold).

    All transformations are fed the same incoming gradient.

    Args:
      momentum: gradients in, m out, such as `first_moment(.9)` or `optax.ema`.
      curvature: gradients in, h out, such as `hessian_estimate(hutchinson())`.
      denominator: a pure function of h and v, such as `floor(gamma, eps)`.
      second_moment: gradients in, v out, such as `second_moment(.95)` for `rms_floor`; None takes
        h for v. It is passed no extra arguments.
      gain: a function of the trees (m, h), a factor on h in the denominator; None is 1.
      clip_threshold: bound on each coordinate, > 0; None is no bound.
      two_sided: bound from both sides; False only from above.
      statistics: take the clipped and floored fractions on refreshes of h; with a dynamic
        `refresh` that is a `lax.cond`.
      statistics_fraction: share of the coordinates that they are taken on, in (0, 1], a number
        of Python: every n-th along each axis, always the same; axes under 128 or no multiple of 16
        are taken whole. The standard error is about that of as many drawn at random,
        sqrt(p (1 - p) / n), .0004 for p = .5 and 125 M parameters; twice that was seen.

    Extra arguments of `update`:
      radius: r, a scalar from an enclosing `trust_region`. The step is then
        clip(r m / denominator(r h, v), r clip_threshold): Newton steps keep their length, all
        that is bounded otherwise is bounded r times as far.
      **extra: passed on to momentum and curvature, to the latter with `momentum=m`.

    Returns:
      A transformation whose output has the dtype of the incoming gradient, or of the parameter
      where that is wider; the ratio is computed
      in float32 at least. Its state holds the inner states, the statistics, read by `diagnostics`,
      and what `trust_region` predicts the gain of a step with. Where the momentum is not finite,
      neither is the step, as with `optax.adam`: clipped, it would go on for ever unnoticed. Wrap
      the optimizer in `optax.apply_if_finite` to leave gradients out that are not finite. A leaf
      whose gradient is None gets no update, and its momentum decays.

    Raises:
      ValueError: `clip_threshold` is not above 0; `statistics_fraction` is not in (0, 1]; at `init`
        a leaf of params is no real number.
      TypeError: `denominator` cannot be called with (h, v).

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 3, line 13; SOAA, lines 8 to 10 and 19,
    for the gain, the radius and the sums.

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
        checks.in_range("clip_threshold", clip_threshold, 0, float("inf"))
        checks.nonzero(
            "clip_threshold", clip_threshold, "it stops all movement; None turns clipping off."
        )
    checks.in_range("statistics_fraction", statistics_fraction, 0, 1)
    checks.nonzero(
        "statistics_fraction",
        statistics_fraction,
        "nothing would be counted; statistics=False takes none.",
    )
    _check_denominator(denominator)
    momentum = optax.with_extra_args_support(momentum)
    curvature = optax.with_extra_args_support(curvature)
    second = optax.with_extra_args_support(second_moment or optax.identity())
    statistics = statistics and clip_threshold is not None

    def init(params):
        checks.real_leaves("clip_by_ratio", params)

        def scalar(value, dtype):
            return varying_like(jnp.asarray(value, dtype), params)

        return ClipByRatioState(
            momentum=momentum.init(params),
            curvature=curvature.init(params),
            second_moment=second.init(params),
            linear=scalar(0, widest(params)),
            quadratic=scalar(0, widest(params)),
            clipped=scalar(0, jnp.float32) if statistics else (),
            floored=scalar(1, jnp.float32) if statistics else (),
            nonfinite=scalar(0, jnp.int32) if statistics else (),
        )

    @none_left_alone
    def update(updates, state, params=None, *, radius=None, **extra):
        checks.real_numbers("the gradient", updates)
        m, momentum_state = momentum.update(updates, state.momentum, params, **extra)
        told = extra | {"momentum": m}
        h, curvature_state = curvature.update(updates, state.curvature, params, **told)
        v, second_state = second.update(updates, state.second_moment, params)
        h = jax.tree.map(widen, h)  # of any curvature: zero over float16's floor would be NaN
        v = h if second_moment is None else jax.tree.map(widen, v)
        m = jax.tree.map(lambda m, h: m.astype(h.dtype), m, h)
        r = 1.0 if radius is None else radius
        scaled = _times(r if gain is None else r * gain(m, h), h)
        moved = _times(r, m)
        ratio = jax.tree.map(lambda m, h, v: m / denominator(h, v), moved, scaled, v)
        bound = None if clip_threshold is None else clip_threshold * r
        measured = (state.clipped, state.floored, state.nonfinite)
        due = refresh_due(extra.get("refresh"), extra.get("hessian"))
        if statistics and due is not False:
            part = functools.partial(jax.tree.map, lambda x: _every_nth(x, statistics_fraction))
            parts = (part(moved), part(scaled), part(v), jax.tree.map(jnp.size, h))

            def measure():
                return *_fractions(*parts, denominator, bound, two_sided), _nonfinite_leaves(
                    momentum_state
                )

            measured = _at_refresh(due, curvature_state, measure, measured)
        step = jax.tree.map(lambda u, m: _clip(u, m, bound, two_sided), ratio, moved)
        sums = (state.linear, state.quadratic)
        if radius is not None:
            sums = _gain_of(step, m, h, sums[0].dtype)
        state = ClipByRatioState(momentum_state, curvature_state, second_state, *sums, *measured)
        return cast_to_step(step, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_denominator(denominator: Any) -> None:
    """Rejects a function that does not take (h, v), and a factory passed without its call."""
    if checks.takes_positional(denominator, 2) and denominator not in (floor, shift, rms_floor):
        return
    name = getattr(denominator, "__name__", repr(denominator))
    raise TypeError(
        f"denominator={name} cannot be called as (h, v), the curvature and the second moment of "
        "the gradient. Pass what a factory returns, such as `floor(.01, 1e-12)`, or "
        "`lambda h, v: ...`, which need not read v."
    )


def _times(scalar: ArrayLike, tree: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda x: jnp.asarray(scalar, x.dtype) * x, tree)


def inner_product(x: optax.Updates, y: optax.Updates, dtype: jnp.dtype) -> jax.Array:
    """Σ x y over the tree; leaves of several dtypes are summed in `dtype`."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y, dtype=dtype), x, y)
    return jax.tree.reduce(jnp.add, products, jnp.zeros([], dtype))


def _gain_of(step, m, h, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(Σ m u, Σ h u²)."""
    square = jax.tree.map(jnp.square, step)
    return inner_product(m, step, dtype), inner_product(h, square, dtype)


def _clip(u: jax.Array, m: jax.Array, threshold: ArrayLike | None, two_sided: bool) -> jax.Array:
    if threshold is None:
        return u
    bound = jnp.asarray(threshold, u.dtype)
    clipped = jnp.clip(u, -bound, bound) if two_sided else jnp.minimum(u, bound)
    return clipped + (m - m)  # NaN where m is not finite: a bounded step would hide it


def _nonfinite_leaves(momentum_state: Any) -> jax.Array:
    """int32 (): leaves of the momentum's state with a number that is NaN or infinite.

    Of the state, which is in memory anyhow. XLA on CPU fuses this sum; to count numbers it would
    write an array.
    """
    leaves = [x for x in jax.tree.leaves(momentum_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    kept = [widen(jax.lax.optimization_barrier(x)) for x in leaves]  # else written once more
    spoilt = [~jnp.isfinite(jnp.sum(x - x)) for x in kept]
    return sum((x.astype(jnp.int32) for x in spoilt), jnp.zeros([], jnp.int32))


def _at_refresh(due: jax.Array | bool | None, curvature_state: Any, measure: Callable, old: Any):
    """`measure()` if h took a sample in this update, or does not say; else `old`."""
    age = getattr(curvature_state, "age", None)
    if age is None:
        return measure()
    if due is True:  # the sample may still have been rejected
        return jax.tree.map(lambda new, old: jnp.where(age == 0, new, old), measure(), old)
    return jax.lax.cond(age == 0, measure, lambda: old)


def _every_nth(x: jax.Array, share: float) -> jax.Array:
    """About `share` of the coordinates: every n-th along each axis, n a power of 2.

    Strides grow on all axes alike, since rows are words or neurons and columns are channels, and
    stop at 64 places an axis, so small leaves are whole. They divide the axis into a multiple of
    8, so that a shard, one of 8 or a divisor of it, holds its own: a slice x[:n] would move data.
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


def _fractions(m, h, v, sizes, denominator, bound, two_sided) -> tuple[jax.Array, jax.Array]:
    """(clipped / live, floored / all) from parts of leaves that have these sizes.

    A coordinate is live if its curvature lifts it off zero's. On dead ones, such as unused
    embedding rows, being clipped or not means nothing.
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
