"""Tadam's second moment: the variance of the gradient around its momentum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.numerics import accumulation_dtype, widen, widest
from sophia_optax.transforms.stochastic_rounding import round_to

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


class CenteredMomentState(NamedTuple):
    """State of `centered_second_moment`.

    >>> import jax.numpy as jnp
    >>> print(centered_second_moment(.9, .99, eps=.5).init(jnp.zeros(2)).nu)
    [0.5 0.5]
    """

    count: jax.Array  # int32 (), updates seen  # pyright: ignore[reportIncompatibleMethodOverride]
    nu: optax.Updates  # float32 or `dtype`, shaped as params: the uncorrected average


def centered_second_moment(
    b1: ArrayLike, b2: ArrayLike, eps: ArrayLike = 1e-8, *, dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Gradients in, their variance around the momentum out: Tadam's second moment.

        v <- b2 v + (1 - b2) c (g - m̂_{t-1})²,  c = (b2 - b2^t) / (1 - b2^t),  v = eps at first
        out = v / (1 - b2^t)

    With b1 = b2 this is the exactly weighted variance of the gradients. The state does not hold
    m̂_{t-1}: it follows from g and m̂_t, as g - m̂_{t-1} = (g - m̂_t) (1 - b1^t) / (b1 - b1^t).

    Args:
      b1: decay of the momentum, in (0, 1).
      b2: decay of the variance, in [0, 1).
      eps: variance at the start.
      dtype: dtype of v; None is float32, or float64 where the parameter is. "bfloat16" is rounded
        stochastically.

    Extra arguments of `update`:
      momentum: m̂_t, the bias-corrected momentum of this update; `clip_by_ratio` passes it.

    Returns:
      A transformation. Its output is float32 at least; its state is `CenteredMomentState`.

    Raises:
      ValueError: an argument is out of range; `momentum` is missing.

    Source: the published code of Tadam, which SOAA extends. Tadam's notes put the factor c on v
    instead, which would leave v biased.

    >>> import jax.numpy as jnp
    >>> tx = centered_second_moment(.9, .9, eps=0.)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g, m in ((1., 1.), (3., (.09 * 1 + .1 * 3) / .19)):      # weights .09 and .1
    ...     v, state = tx.update(jnp.array([g]), state, momentum=jnp.array([m]))
    >>> print(v.round(2), round((.09 * .1) / .19**2 * 2**2, 2))
    [1.] 1.0
    """
    checks.decays(b1=b1, b2=b2)
    checks.in_range("eps", eps, 0, float("inf"), open_high=True)
    checks.curvature_dtype("dtype", dtype)
    checks.nonzero("b1", b1, "The previous momentum cannot be recovered from this one then.")

    def init(params):
        def start(x):
            return jnp.full_like(x, eps, dtype=dtype or accumulation_dtype(x))

        checks.real_leaves("centered_second_moment", params)
        checks.decays_in_leaves(params, b1=b1, b2=b2)
        return CenteredMomentState(jnp.zeros([], jnp.int32), jax.tree.map(start, params))

    def update(updates, state, params=None, *, momentum=None, **unused):
        del params, unused
        checks.given(
            "centered_second_moment",
            "momentum",
            momentum,
            "Use it as the curvature of `clip_by_ratio`, which passes it.",
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        scalar = widest(updates)
        decay1, decay2 = jnp.asarray(b1, scalar), jnp.asarray(b2, scalar)
        power1, power2 = (decay ** count.astype(scalar) for decay in (decay1, decay2))
        mass = 1 - power2
        back = jnp.where(count > 1, (1 - power1) / (decay1 - power1), 0)
        weight = (1 - decay2) * (decay2 - power2) / mass * back**2

        def average(nu, g, m):
            wide = accumulation_dtype(nu)
            gap = jnp.square(jnp.asarray(g, wide) - m.astype(wide))
            return decay2.astype(wide) * nu.astype(wide) + weight.astype(wide) * gap

        nu = jax.tree.map(average, state.nu, updates, momentum)
        nu = round_to(state.nu, nu, jax.random.fold_in(jax.random.key(0), count))
        corrected = jax.tree.map(lambda nu: widen(nu) / mass.astype(widen(nu).dtype), nu)
        return corrected, CenteredMomentState(count, nu)

    return optax.GradientTransformationExtraArgs(init, update)
