"""Second moments of the gradient, on every update: Adam's, and the centred one of Tadam."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.estimators.gradient import squared_gradient
from sophia_optax.numerics import accumulation_dtype, widen, widest
from sophia_optax.transforms.clip_by_ratio import inner_product
from sophia_optax.transforms.hessian_estimate import hessian_estimate, round_to
from sophia_optax.transforms.holes import none_left_alone

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


def first_moment(
    decay: ArrayLike, *, bias_correction: bool = True, dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Gradients in, momentum m out: m <- decay m + (1 - decay) g.

    `optax.ema`, and its state, but for what comes out: m as it is stored. Of a bfloat16 m
    `optax.ema` gives the sum before it is rounded; XLA then sums twice, and moves 8 bytes more a
    parameter. Sums are taken in float32 at least, and so is decay, which `optax.ema` rounds like m
    (.965 to .9648, .999 to 1).

    Args:
      decay: β1 in [0, 1).
      bias_correction: divide by 1 - decay^t.
      dtype: of m; None is the parameter's. "bfloat16" is rounded to nearest, and stalls where
        (1 - decay) (g - m) is under a 512th to a 256th of m.

    Returns:
      A transformation with the state of `optax.ema`. Its output is float32 at least.

    Raises:
      ValueError: `decay` is out of range; `dtype` cannot hold an average; at `init` `decay` is 1 in
        the dtype of a leaf.

    Source: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.

    >>> import jax.numpy as jnp
    >>> tx = first_moment(.5, dtype="bfloat16")
    >>> m, state = tx.update(jnp.array([1.001, 2.]), tx.init(jnp.zeros(2)))
    >>> print(m, state.ema)
    [1. 2.] [0.5 1]
    """
    checks.decays(decay=decay)
    checks.momentum_dtype("dtype", dtype)
    ema = optax.ema(decay, debias=False, accumulator_dtype=dtype)  # for its state

    def init(params):
        checks.decays_in_leaves(params, decay=decay)
        return ema.init(params)

    @none_left_alone
    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))

        def average(g, m):
            wide = accumulation_dtype(g)
            new, old = jnp.asarray(1 - decay, wide), jnp.asarray(decay, wide)
            return (new * jnp.asarray(g, wide) + old * m.astype(wide)).astype(m.dtype)

        def corrected(g, m):
            wide = accumulation_dtype(g)
            mass = 1 - jnp.asarray(decay, wide) ** count.astype(wide)
            return m.astype(wide) / mass if bias_correction else m.astype(wide)

        m = jax.tree.map(average, updates, state.ema)
        return jax.tree.map(corrected, updates, m), optax.EmaState(count, m)

    return optax.GradientTransformation(init, update)


def second_moment(
    decay: ArrayLike, *, bias_correction: bool = True, dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Gradients in, Adam's second moment v out: v <- decay v + (1 - decay) g².

    It is `hessian_estimate(squared_gradient(), update_interval=1)` that hears of no `refresh` and
    no `hessian`: those speak of curvature.

    Args:
      decay: β2 in [0, 1).
      bias_correction: divide by 1 - decay^t.
      dtype: of v; None is float32, or float64 where the parameter is; "bfloat16" is rounded
        stochastically.

    Returns:
      A transformation with the state of `hessian_estimate`.

    Raises:
      ValueError: an argument is out of range.

    Source: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.

    >>> import jax.numpy as jnp
    >>> tx = second_moment(.9)
    >>> v, state = tx.update(jnp.array([1., 2.]), tx.init(jnp.zeros(2)))
    >>> print(v)
    [1. 4.]
    """
    average = hessian_estimate(
        squared_gradient(),
        decay=decay,
        update_interval=1,
        bias_correction=bias_correction,
        dtype=dtype,
    )

    def update(updates, state, params=None):
        return average.update(updates, state, params)

    return optax.GradientTransformation(average.init, update)


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
    r"""Gradients in, their variance about the momentum out.

        v <- b2 v + (1 - b2) c (g - m̂_{t-1})²,  c = (b2 - b2^t) / (1 - b2^t),  v = eps at first
        out = v / (1 - b2^t)

    For b1 = b2 this is the exactly weighted variance. m̂_{t-1} is no state: it follows from g and
    m̂_t, since g - m̂_{t-1} = (g - m̂_t) (1 - b1^t) / (b1 - b1^t).

    Args:
      b1: decay of the momentum, in (0, 1).
      b2: decay of the variance, in [0, 1).
      eps: variance at the start.
      dtype: of v; None is float32, or float64 where the parameter is; "bfloat16" is rounded
        stochastically.

    Extra arguments of `update`:
      momentum: m̂_t, the bias-corrected momentum of this update; `clip_by_ratio` passes it.

    Returns:
      A transformation whose state holds the count and v.

    Raises:
      ValueError: an argument is out of range; `momentum` is missing.

    Source: Tadam, the parent of SOAA, as in its published code. Its notes have the factor c on v,
    which would leave v uncorrected.

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
    checks.nonzero("b1", b1, "The momentum before this update cannot be told without any.")

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


def ratio_of_sums(eps: ArrayLike):
    """SOAA's line 8: the factor 1 + Σ m² / Σ (s + eps) on s."""

    def gain(m, s):
        dtype = widest(s)
        size = jnp.asarray(max(optax.tree.size(s), 1), dtype)
        total = jnp.asarray(optax.tree.sum(s), dtype)
        return 1 + inner_product(m, m, dtype) / (total + size * jnp.asarray(eps, dtype))

    return gain


def sum_of_ratios(eps: ArrayLike):
    """Tadam's: the factor 1 + Σ m² / (v + eps) on v."""

    def gain(m, v):
        scaled = jax.tree.map(lambda m, v: m / (v + jnp.asarray(eps, v.dtype)), m, v)
        return 1 + inner_product(m, scaled, widest(v))

    return gain
