"""Averages of the gradient: its first moment, and Adam's second."""

import warnings

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.estimators.gradient import squared_gradient
from sophia_optax.numerics import accumulation_dtype
from sophia_optax.transforms.hessian_estimate import hessian_estimate
from sophia_optax.transforms.none_leaves import skip_none_leaves

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


def ema(
    decay: ArrayLike, debias: bool = True, accumulator_dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Gradients in, momentum out: m <- decay m + (1 - decay) g.

    It takes the arguments and has the state of `optax.ema`, and differs in three things.

    The output is m as it is stored. With a bfloat16 m, `optax.ema` returns the sum before it is
    rounded; XLA then computes the sum twice and moves 8 more bytes per parameter.

    Sums and `decay` are float32 at least. `optax.ema` rounds `decay` to the dtype of m: in bfloat16
    .965 becomes .9648 and .999 becomes 1.

    A leaf whose gradient is None has no output, and its m decays.

    Args:
      decay: β1 in [0, 1).
      debias: divide the output by 1 - decay^t, t counting the updates from 1.
      accumulator_dtype: dtype of m; None is the parameter's. "bfloat16" rounds to nearest, so m
        stops moving where (1 - decay) (g - m) is below 1/512 to 1/256 of m.

    Returns:
      A transformation. Its output is float32, or float64 where the gradient is. Its state is
      `optax.EmaState`, which holds the update count and m.

    Raises:
      ValueError: `decay` is outside [0, 1); `accumulator_dtype` cannot hold an average; at `init`
        `decay` is 1 in the dtype in which a leaf is averaged.

    Source: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.

    >>> import jax.numpy as jnp
    >>> tx = ema(.5, accumulator_dtype="bfloat16")
    >>> m, state = tx.update(jnp.array([1.001, 2.]), tx.init(jnp.zeros(2)))
    >>> print(m, state.ema)
    [1. 2.] [0.5 1]
    """
    checks.decays(decay=decay)
    checks.momentum_dtype("accumulator_dtype", accumulator_dtype)
    optax_ema = optax.ema(decay, debias=False, accumulator_dtype=accumulator_dtype)

    def init(params):
        checks.decays_in_leaves(params, decay=decay)
        return optax_ema.init(params)

    @skip_none_leaves
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
            return m.astype(wide) / mass if debias else m.astype(wide)

        m = jax.tree.map(average, updates, state.ema)
        return jax.tree.map(corrected, updates, m), optax.EmaState(count, m)

    return optax.GradientTransformation(init, update)


def first_moment(
    decay: ArrayLike, *, bias_correction: bool = True, dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Deprecated name of `ema`: use `ema(decay, debias, accumulator_dtype)`.

    Args:
      decay: `decay` of `ema`.
      bias_correction: `debias` of `ema`.
      dtype: `accumulator_dtype` of `ema`.

    Returns:
      The same transformation as `ema`. The call warns with a DeprecationWarning.

    Source: as `ema`.

    >>> import warnings
    >>> import jax.numpy as jnp
    >>> with warnings.catch_warnings(action="ignore"):
    ...     tx = first_moment(.5, bias_correction=False)
    >>> print(tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0])
    [0.5 0.5]
    """
    warnings.warn(
        f"sophia_optax.first_moment is deprecated. Call `sophia_optax.ema({decay}, "
        f"debias={bias_correction}, accumulator_dtype={dtype!r})` instead.",
        DeprecationWarning,
        stacklevel=2,
    )
    return ema(decay, debias=bias_correction, accumulator_dtype=dtype)


def second_moment(
    decay: ArrayLike, *, bias_correction: bool = True, dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Gradients in, Adam's second moment out: v <- decay v + (1 - decay) g².

    The average of `hessian_estimate(squared_gradient(), update_interval=1, reject="coordinate")`,
    but it ignores the extra arguments `refresh` and `hessian`, which concern curvature.

    Args:
      decay: β2 in [0, 1).
      bias_correction: divide the output by 1 - decay^t.
      dtype: dtype of v; None is float32, or float64 where the parameter is. "bfloat16" is rounded
        stochastically.

    Returns:
      A transformation. Its output is float32 at least; its state is `HessianEstimateState`.

    Raises:
      ValueError: `decay` is outside [0, 1), or `dtype` cannot hold v.

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
        reject="coordinate",
    )

    def update(updates, state, params=None):
        return average.update(updates, state, params)

    return optax.GradientTransformation(average.init, update)
