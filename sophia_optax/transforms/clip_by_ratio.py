"""How momentum meets curvature: their ratio, clipped coordinate by coordinate."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.numerics import cast_to_step, widen, widest
from sophia_optax.sharding import varying_like
from sophia_optax.transforms.denominators import Denominator, floor, rms_floor, shift
from sophia_optax.transforms.hessian_estimate import refresh_due
from sophia_optax.transforms.none_leaves import skip_none_leaves
from sophia_optax.transforms.predicted_reduction import PredictedReduction, predict
from sophia_optax.transforms.ratio_statistics import (
    at_refresh,
    every_nth,
    fractions,
    nonfinite_leaves,
)

ArrayLike = jax.typing.ArrayLike


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
    second_moment: Any  # state of `second_moment`; empty without one
    predicted_reduction: PredictedReduction  # of the last step that was given a radius
    clipped: Any  # float32 (): share of clipped coordinates among those above the floor
    floored: Any  # float32 (): share of all coordinates that are at the floor; 1 before a refresh
    nonfinite: Any  # int32 (): leaves in the state of `momentum` with a non-finite number


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

    Momentum, curvature and second moment are all fed the same incoming gradient.

    Args:
      momentum: gradients in, m out, such as `ema(.9)`.
      curvature: gradients in, h out, such as `hessian_estimate(hutchinson())`.
      denominator: a pure function of (h, v), such as `floor(gamma, eps)`.
      second_moment: gradients in, v out, such as `second_moment(.95)` for `rms_floor`. It receives
        no extra arguments. None uses h as v.
      gain: a function of the trees (m, h) that returns a factor on h in the denominator; None is 1.
      clip_threshold: bound on each coordinate of u, > 0; None is no bound.
      two_sided: True bounds u from both sides, False only from above.
      statistics: measure the clipped and floored fractions at refreshes of h; with a dynamic
        `refresh` this is a `lax.cond`.
      statistics_fraction: share of the coordinates that the fractions are measured on, a Python
        number in (0, 1]: every n-th coordinate along each axis, the same at every refresh. Axes
        that are shorter than 128 or no multiple of 16 are taken whole. The standard error is about
        that of a random sample, sqrt(p (1 - p) / n), or .0004 for p = .5 and 125 M parameters; up
        to twice that has been seen.

    Extra arguments of `update`:
      radius: r, a scalar from an enclosing `trust_region`. The step is then
        clip(r m / denominator(r h, v), r clip_threshold): Newton steps keep their length, and all
        bounds grow with r.
      **extra: passed on to `momentum`, and together with `momentum=m` to `curvature`.

    Returns:
      A transformation. The ratio is computed in float32 at least; the output has the dtype of the
      gradient, or of the parameter if that is wider. The state, `ClipByRatioState`, holds the inner
      states, the `PredictedReduction` for `trust_region`, and statistics for `diagnostics`.
      A non-finite momentum makes a non-finite step, as with `optax.adam`: if it were clipped,
      training would go on unnoticed. `optax.apply_if_finite` around the optimizer skips non-finite
      gradients. A leaf whose gradient is None gets no update, and its momentum decays.

    Raises:
      ValueError: `clip_threshold` is not above 0; `statistics_fraction` is outside (0, 1]; at
        `init` a leaf of params is not real floating point.
      TypeError: `denominator` cannot be called with (h, v).

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 3, line 13. The gain, the radius and the
    predicted reduction are lines 8 to 10 and 19 of SOAA's algorithm 1.

    >>> import jax.numpy as jnp
    >>> from sophia_optax import ema, hessian_estimate, squared_gradient
    >>> curvature = hessian_estimate(squared_gradient(), update_interval=1)
    >>> tx = clip_by_ratio(ema(0.), curvature, denominator=floor(1., 1e-12))
    >>> g = jnp.array([.5, -4.])
    >>> u, state = tx.update(g, tx.init(g))
    >>> print(u, state.clipped)                      # g / max(g², eps) = (2, -1/4)
    [ 1.   -0.25] 0.5
    """
    _check(denominator, clip_threshold, statistics_fraction)
    ratio = _ClippedRatio(
        optax.with_extra_args_support(momentum),
        optax.with_extra_args_support(curvature),
        None if second_moment is None else optax.with_extra_args_support(second_moment),
        denominator,
        gain,
        clip_threshold,
        two_sided,
        statistics and clip_threshold is not None,
        statistics_fraction,
    )
    return optax.GradientTransformationExtraArgs(ratio.init, skip_none_leaves(ratio.update))


@dataclasses.dataclass(frozen=True, eq=False)
class _ClippedRatio:
    """The arguments of `clip_by_ratio`, and its `init` and `update`."""

    momentum: optax.GradientTransformationExtraArgs
    curvature: optax.GradientTransformationExtraArgs
    second_moment: optax.GradientTransformationExtraArgs | None
    denominator: Denominator
    gain: Callable[[optax.Updates, optax.Updates], jax.Array] | None
    clip_threshold: ArrayLike | None
    two_sided: bool
    statistics: bool
    statistics_fraction: float

    def init(self, params):
        checks.real_leaves("clip_by_ratio", params)

        def scalar(value, dtype):
            return varying_like(jnp.asarray(value, dtype), params)

        second = optax.identity() if self.second_moment is None else self.second_moment
        wide = widest(params)
        return ClipByRatioState(
            momentum=self.momentum.init(params),
            curvature=self.curvature.init(params),
            second_moment=second.init(params),
            predicted_reduction=PredictedReduction(scalar(0, wide), scalar(0, wide)),
            clipped=scalar(0, jnp.float32) if self.statistics else (),
            floored=scalar(1, jnp.float32) if self.statistics else (),
            nonfinite=scalar(0, jnp.int32) if self.statistics else (),
        )

    def update(self, updates, state, params=None, *, radius=None, **extra):
        checks.real_numbers("the gradient", updates)
        (m, h, v), states = self.averages(updates, state, params, extra)
        r = 1.0 if radius is None else radius
        moved = _times(r, m)
        scaled = _times(r if self.gain is None else r * self.gain(m, h), h)
        bound = None if self.clip_threshold is None else self.clip_threshold * r
        measured = (state.clipped, state.floored, state.nonfinite)
        due = refresh_due(extra.get("refresh"), extra.get("hessian"))
        if self.statistics and due is not False:
            measured = self.measure(due, states, (moved, scaled, v), bound, measured)

        def clipped_ratio(m, h, v):
            return _clip(m / self.denominator(h, v), m, bound, self.two_sided)

        step = jax.tree.map(clipped_ratio, moved, scaled, v)
        prediction = state.predicted_reduction
        if radius is not None:
            prediction = predict(step, m, h, prediction.linear.dtype)
        new = ClipByRatioState(*states, prediction, *measured)
        return cast_to_step(step, updates, params), new

    def averages(self, updates, state, params, extra):
        """((m, h, v), their states), all in float32 at least."""
        m, momentum_state = self.momentum.update(updates, state.momentum, params, **extra)
        extra = extra | {"momentum": m}
        h, curvature_state = self.curvature.update(updates, state.curvature, params, **extra)
        h = jax.tree.map(widen, h)  # the floor is 0 in float16, and 0 / 0 would be NaN
        v, second_state = h, state.second_moment
        if self.second_moment is not None:
            v, second_state = self.second_moment.update(updates, state.second_moment, params)
            v = jax.tree.map(widen, v)
        m = jax.tree.map(lambda m, h: m.astype(h.dtype), m, h)
        return (m, h, v), (momentum_state, curvature_state, second_state)

    def measure(self, due, states, averages, bound, old):
        """(clipped, floored, nonfinite) if h took a sample in this update, else `old`."""
        momentum_state, curvature_state, _ = states
        # Sampled outside of the cond, since all operands of a cond are written to memory.
        part = functools.partial(jax.tree.map, lambda x: every_nth(x, self.statistics_fraction))
        m, h, v = map(part, averages)
        sizes = jax.tree.map(jnp.size, averages[1])

        def measured():
            shares = fractions(m, h, v, sizes, self.denominator, bound, self.two_sided)
            return *shares, nonfinite_leaves(momentum_state)

        return at_refresh(due, curvature_state, measured, old)


def _check(denominator: Any, clip_threshold: Any, statistics_fraction: Any) -> None:
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


def _clip(u: jax.Array, m: jax.Array, threshold: ArrayLike | None, two_sided: bool) -> jax.Array:
    if threshold is None:
        return u
    bound = jnp.asarray(threshold, u.dtype)
    clipped = jnp.clip(u, -bound, bound) if two_sided else jnp.minimum(u, bound)
    return clipped + (m - m)  # NaN where m is not finite: a bounded step would hide it
