"""How far a step goes: an adaptive radius around any direction."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.numerics import widen, widest
from sophia_optax.sharding import varying_like
from sophia_optax.transforms.predicted_reduction import (
    PredictedReduction,
    inner_product,
    total_prediction,
)

ArrayLike = jax.typing.ArrayLike


class TrustRegionState(NamedTuple):
    """State of `trust_region`; its scalars are float32, or float64 where a parameter is.

    >>> import jax.numpy as jnp, optax
    >>> from sophia_optax import soaa
    >>> state = optax.tree.get(soaa(1e-3, total_steps=100).init(jnp.zeros(2)), "TrustRegionState")
    >>> print(state.radius)
    1.0
    """

    count: jax.Array  # int32 (), updates seen  # pyright: ignore[reportIncompatibleMethodOverride]
    radius: jax.Array  # (), r; 1 at first
    loss: jax.Array  # (), average of the losses seen, before bias correction
    mass: jax.Array  # (), total weight of those losses; it tends to 1
    predicted: jax.Array  # (), predicted reduction of the loss by the last step
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
    r"""An adaptive radius r around a direction: r follows how well its steps predict the loss.

        l <- b1 l + (1 - b1) value,  l̂ = l / mass
        soaa:   after the step, r <- clip(r (l̂ - value) / max(predicted, eps), low, high)
        tadam:  before it, ρ = (l̂ of the losses before - value) / max(predicted, eps) and
                r <- clip(r (low if ρ < gamma, high if ρ > 1 - gamma, else 1), low, high)
        low = (1 - gamma)^((t-1)/T),  high = 1 + gamma^((t-1)/T)
        predicted <- lr (a - b/2) for soaa, lr (a - (a² + b)/2) for tadam

    a and b say what a step u gains. A direction that takes the radius into its own step, as
    `clip_by_ratio` does, leaves them in its state as a `PredictedReduction`: a = Σ m u and
    b = Σ h u². Any other direction is multiplied by r, with a = Σ g u and b = 0.

    Args:
      inner: the direction, before weight decay and learning rate, such as
        `optax.scale_by_adam()` or a `clip_by_ratio`.
      learning_rate: the scalar or schedule that the direction will be multiplied by.
      total_steps: T, the length of the run. Over it the bounds of r move from [1, 2] to
        [1 - gamma, 1 + gamma]; beyond it they would keep moving.
      b1: decay of the average loss.
      eps: floor of the predicted reduction, above 0.
      gamma: width of the bounds, in [0, 1).
      rule: "soaa" (lines 15 to 20 of its algorithm 1, as printed) or "tadam", the rule of its
        predecessor.
      loss_correction: "seen" divides the average loss by the total weight of the losses seen.
        "steps" divides it by 1 - b1^t, t counting all updates, as printed. The two differ if some
        updates pass no loss.

    Extra arguments of `update`:
      value: the loss of this step, a scalar. Without one, or with a non-finite one, the radius,
        the average loss and the prediction stay as they are.
      **extra: passed on to `inner`, together with `radius=r` and `value`.

    Returns:
      A transformation. Its output is the step of `inner` within the radius. Its state,
      `TrustRegionState`, holds r and scalars about the loss, which `diagnostics` reads. If
      `inner` treats parts of the tree differently (`optax.partition`), put one region around
      each part, or one around all if every part holds a `clip_by_ratio`.

    Raises:
      ValueError: an argument is out of range.
      TypeError: `value` is not a scalar.

    Source: SOAA, algorithm 1; Tadam. By default l̂ is corrected by the weight of the losses seen,
    which equals the printed 1 - b1^t if every update passes a loss.

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
    region = _Region(inner, learning_rate, total_steps, b1, eps, gamma, rule, loss_correction)
    return optax.GradientTransformationExtraArgs(region.init, region.update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Region:
    """The arguments of `trust_region`, and its `init` and `update`."""

    inner: optax.GradientTransformationExtraArgs
    learning_rate: optax.ScalarOrSchedule
    total_steps: ArrayLike
    b1: ArrayLike
    eps: ArrayLike
    gamma: ArrayLike
    rule: str
    loss_correction: str

    def init(self, params):
        checks.real_leaves("trust_region", params)
        checks.decays_in_leaves(params, b1=self.b1)
        zero = varying_like(jnp.zeros([], widest(params)), params)
        scalars = {"loss": zero, "mass": jnp.copy(zero), "predicted": jnp.copy(zero)}
        return TrustRegionState(
            jnp.zeros([], jnp.int32), jnp.ones_like(zero), inner=self.inner.init(params), **scalars
        )

    def update(self, updates, state, params=None, *, value=None, **extra):
        checks.real_numbers("the gradient", updates)
        dtype = state.radius.dtype
        loss = _scalar(value, dtype)
        seen = jnp.isfinite(loss)
        old = (state.radius, state.loss, state.mass)
        radius, mean, mass = (
            jnp.where(seen, x, y).astype(dtype)
            for x, y in zip(self.observe(state, loss), old, strict=True)
        )
        now = state.radius if self.rule == "soaa" else radius
        step, inner_state = self.inner.update(
            updates, state.inner, params, radius=now, value=value, **extra
        )
        step, gain = _within(now, step, updates, inner_state)
        predicted = self.reduction(state.count, gain).astype(dtype)
        predicted = jnp.where(seen & jnp.isfinite(predicted), predicted, state.predicted)
        count = jnp.asarray(optax.safe_increment(state.count))
        return step, TrustRegionState(count, radius, mean, mass, predicted, inner_state)

    def observe(self, state, value):
        """(radius, loss, mass) after this step's loss."""
        b1 = self.b1
        loss, mass = b1 * state.loss + (1 - b1) * value, b1 * state.mass + (1 - b1)
        before, now = state.mass, mass
        if self.loss_correction == "steps":
            before, now = (1 - b1 ** (state.count.astype(loss.dtype) + n) for n in (0, 1))
        if self.rule == "soaa":
            # l̂ - value, in a form that is exactly 0 at the first loss: eps would magnify rounding
            return self.resize(state, b1 * (state.loss - before * value) / now), loss, mass
        first = state.mass == 0
        expected = state.loss / jnp.where(first, 1, before)
        radius = jnp.where(first, state.radius, self.resize(state, expected - value))
        return radius, loss, mass

    def resize(self, state, fall):
        """The radius after a loss that fell `fall` below its expectation."""
        power = state.count.astype(state.radius.dtype) / self.total_steps  # count is t - 1
        low, high = (1 - self.gamma) ** power, 1 + self.gamma**power
        factor = fall / jnp.maximum(state.predicted, self.eps)
        if self.rule == "tadam":
            above = factor > 1 - self.gamma
            factor = jnp.where(factor < self.gamma, low, jnp.where(above, high, 1))
        return jnp.clip(factor * state.radius, low, high)

    def reduction(self, count, gain: PredictedReduction) -> jax.Array:
        """The reduction of the loss that a step of this gain predicts."""
        linear, quadratic = gain
        rate = self.learning_rate(count) if callable(self.learning_rate) else self.learning_rate
        bend = quadratic if self.rule == "soaa" else jnp.square(linear) + quadratic
        return jnp.asarray(rate * (linear - bend / 2))


def _scalar(value: Any, dtype: jnp.dtype) -> jax.Array:
    """The loss, or NaN if there is none: a non-finite loss is ignored."""
    value = jnp.nan if value is None else value
    if isinstance(value, optax.MaskedNode) or jnp.shape(value) != ():
        raise TypeError(
            f"`value` must be the scalar loss of this step, not {value!r}. If a wrapper masked it "
            "because params is a single array, wrap params in a dict."
        )
    return jnp.asarray(value, dtype)


def _within(
    radius: jax.Array, step: optax.Updates, updates: optax.Updates, inner_state: Any
) -> tuple[optax.Updates, PredictedReduction]:
    """(the step within the radius, its predicted reduction)."""
    prediction = total_prediction(inner_state)
    if prediction is not None:  # the direction has taken the radius into its step
        return step, prediction
    wide = jax.tree.map(widen, step)
    scaled = jax.tree.map(lambda u: radius.astype(u.dtype) * u, wide)
    linear = inner_product(jax.tree.map(widen, updates), scaled, radius.dtype)
    return optax.tree.cast_like(scaled, step), PredictedReduction(linear, jnp.zeros_like(linear))
