"""How far a step goes: an adaptive radius around any direction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.numerics import widen, widest
from sophia_optax.sharding import varying_like
from sophia_optax.transforms.clip_by_ratio import ClipByRatioState, inner_product

ArrayLike = jax.typing.ArrayLike


class TrustRegionState(NamedTuple):
    """State of `trust_region`; scalars are float32, or float64 where a parameter is.

    >>> import jax.numpy as jnp, optax
    >>> from sophia_optax import soaa
    >>> state = optax.tree.get(soaa(1e-3, total_steps=100).init(jnp.zeros(2)), "TrustRegionState")
    >>> print(state.radius)
    1.0
    """

    count: jax.Array  # int32 (), updates seen  # pyright: ignore[reportIncompatibleMethodOverride]
    radius: jax.Array  # (), 1 at first
    loss: jax.Array  # (), average of the losses seen, uncorrected
    mass: jax.Array  # (), the weight of those losses; 1 in the limit
    predicted: jax.Array  # (), reduction of the loss that the last step was to bring
    inner: Any  # state of `inner`


def trust_region(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    total_steps: ArrayLike,
    b1: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    gamma: ArrayLike = 0.25,
    rule: str = "soaa",
    loss_correction: str = "seen",
) -> optax.GradientTransformationExtraArgs:
    r"""An adaptive radius r around a direction, from how well its steps predict the loss.

        l <- b1 l + (1 - b1) value,  l̂ = l / mass
        soaa:   after the step, r <- clip(r (l̂ - value) / max(predicted, eps), low, high)
        tadam:  before it, ρ = (l̂ of the losses before - value) / max(predicted, eps) and
                r <- clip(r (low if ρ < gamma, high if ρ > 1 - gamma, else 1), low, high)
        low = (1 - gamma)^((t-1)/T),  high = 1 + gamma^((t-1)/T)
        predicted <- lr (a - b/2) for soaa, lr (a - (a² + b)/2) for tadam

    `clip_by_ratio` takes the radius inside its ratio and says what a step u gains: a = Σ m u and
    b = Σ h u². Any other direction is multiplied by r, and a = Σ g u, b = 0.

    Args:
      inner: the direction, before weight decay and learning rate, such as
        `optax.scale_by_adam()` or a `clip_by_ratio`.
      learning_rate: the scalar or schedule that the direction will be multiplied by.
      total_steps: T, over which the bounds go from [1, 2] to [1 - gamma, 1 + gamma]; it must cover
        the run, since they go on from there.
      b1: decay of the average loss.
      eps: floor of the predicted reduction, above 0.
      gamma: width of the bounds, in [0, 1).
      rule: "soaa" (lines 15 to 20 of its algorithm 1, as printed) or "tadam", its parent's.
      loss_correction: "seen" divides the average loss by the weight of the losses that came;
        "steps" by 1 - b1^t, t counting every update, as printed. They differ where updates bring no
        loss.

    Extra arguments of `update`:
      value: the loss of this step, a scalar. Without one, or with one that is not finite, the
        radius, the average and the prediction stay.
      **extra: passed on to `inner`, with `radius=r`.

    Returns:
      A transformation. Its state holds r and scalars about the loss, read by `diagnostics`. Where
      `inner` treats parts of the tree apart (`optax.partition`), put the region around each part,
      or around parts that all hold a `clip_by_ratio`.

    Raises:
      ValueError: an argument is out of range.
      TypeError: `value` is no scalar.

    Source: SOAA, algorithm 1; Tadam. By default l̂ is corrected by the mass of the losses seen,
    which is the printed 1 - b1^t where every update brings one.

    >>> import jax.numpy as jnp, optax
    >>> tx = trust_region(optax.identity(), .1, total_steps=100)
    >>> g = jnp.array([1., 2.])
    >>> state = tx.init(g)
    >>> for value in (3., 1.):             # predicted: lr Σ g u = .5; the average loss is 1.95
    ...     u, state = tx.update(g, state, value=value)
    >>> print(state.predicted, state.radius.round(2))
    0.5 1.89
    """
    checks.one_of("rule", rule, ("soaa", "tadam"))
    checks.one_of("loss_correction", loss_correction, ("seen", "steps"))
    checks.decays(b1=b1)
    if not callable(learning_rate):
        checks.real_number("learning_rate", learning_rate)
        checks.finite(learning_rate=learning_rate)
    checks.in_range("gamma", gamma, 0, 1, open_high=True)
    checks.in_range("eps", eps, 0, float("inf"), open_high=True)
    checks.nonzero(
        "eps", eps, "the first loss would be divided by it; take a small number above 0."
    )
    checks.positive_integer("total_steps", total_steps)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        checks.real_leaves("trust_region", params)
        checks.decays_in_leaves(params, b1=b1)
        zero = varying_like(jnp.zeros([], widest(params)), params)
        scalars = {"loss": zero, "mass": jnp.copy(zero), "predicted": jnp.copy(zero)}
        return TrustRegionState(
            jnp.zeros([], jnp.int32), jnp.ones_like(zero), inner=inner.init(params), **scalars
        )

    def resize(state, fall):
        """The radius after a loss that far under the one expected."""
        power = state.count.astype(state.radius.dtype) / total_steps  # count is t - 1
        low, high = (1 - gamma) ** power, 1 + gamma**power
        factor = fall / jnp.maximum(state.predicted, eps)
        if rule == "tadam":
            factor = jnp.where(factor < gamma, low, jnp.where(factor > 1 - gamma, high, 1))
        return jnp.clip(factor * state.radius, low, high)

    def observe(state, value):
        """(radius, loss, mass) after this step's loss."""
        loss, mass = b1 * state.loss + (1 - b1) * value, b1 * state.mass + (1 - b1)
        before, now = state.mass, mass
        if loss_correction == "steps":
            before, now = (1 - b1 ** (state.count.astype(loss.dtype) + n) for n in (0, 1))
        if rule == "soaa":
            # l̂ - value, in a form that is exactly 0 at the first loss: eps would magnify rounding
            return resize(state, b1 * (state.loss - before * value) / now), loss, mass
        first = state.mass == 0
        expected = state.loss / jnp.where(first, 1, before)
        return jnp.where(first, state.radius, resize(state, expected - value)), loss, mass

    def update(updates, state, params=None, *, value=None, **extra):
        checks.real_numbers("the gradient", updates)
        dtype = state.radius.dtype
        loss = _scalar(value, dtype)
        seen = jnp.isfinite(loss)
        old = (state.radius, state.loss, state.mass)
        radius, mean, mass = (
            jnp.where(seen, x, y).astype(dtype)
            for x, y in zip(observe(state, loss), old, strict=True)
        )
        now = state.radius if rule == "soaa" else radius
        step, inner_state = inner.update(
            updates, state.inner, params, radius=now, value=value, **extra
        )
        step, linear, quadratic = _gain(step, updates, inner_state, now)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        bend = quadratic if rule == "soaa" else jnp.square(linear) + quadratic
        predicted = (rate * (linear - bend / 2)).astype(dtype)
        predicted = jnp.where(seen & jnp.isfinite(predicted), predicted, state.predicted)
        count = jnp.asarray(optax.safe_increment(state.count))
        return step, TrustRegionState(count, radius, mean, mass, predicted, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _scalar(value: Any, dtype: jnp.dtype) -> jax.Array:
    """The loss; NaN, which is not looked at, where there is none."""
    value = jnp.nan if value is None else value
    if isinstance(value, optax.MaskedNode) or jnp.shape(value) != ():
        raise TypeError(
            f"`value` must be the scalar loss of this step, not {value!r}. Where a wrapper masked "
            "it because params is a single array, wrap params in a dict."
        )
    return jnp.asarray(value, dtype)


def _gain(step, updates, inner_state, radius) -> tuple[optax.Updates, jax.Array, jax.Array]:
    """(the step, Σ m u, Σ h u²) of a ratio that knew the radius, else of the direction times it."""

    def is_ratio(state):
        return isinstance(state, ClipByRatioState)

    ratios = [s for s in jax.tree.leaves(inner_state, is_leaf=is_ratio) if is_ratio(s)]
    if ratios:
        sums = jnp.sum(jnp.array([(s.linear, s.quadratic) for s in ratios]), axis=0)
        return step, sums[0], sums[1]

    wide = jax.tree.map(widen, step)
    scaled = jax.tree.map(lambda u: radius.astype(u.dtype) * u, wide)
    linear = inner_product(jax.tree.map(widen, updates), scaled, radius.dtype)
    return optax.tree.cast_like(scaled, step), linear, jnp.zeros_like(linear)
