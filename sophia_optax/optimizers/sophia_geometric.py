"""Geometric SophiaG: momentum over squared gradients, weighted down by the gradient's norm."""

import jax
import optax

from sophia_optax.estimators.gradient import bounded, weighted_squared_gradient
from sophia_optax.optimizers.decay_and_rate import Mask, check_averages, decay_and_rate
from sophia_optax.transforms.clip_by_ratio import clip_by_ratio
from sophia_optax.transforms.denominators import shift
from sophia_optax.transforms.hessian_estimate import hessian_estimate
from sophia_optax.transforms.moments import ema

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


def sophia_geometric(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    two_sided: bool = True,
    rho: ArrayLike | None = None,
    clip_threshold: ArrayLike | None = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    hessian_dtype: DTypeLike | None = None,
    debias_momentum: bool = False,
    debias_hessian: bool = False,
    seed: ArrayLike = 0,
    statistics: bool = False,
    max_norm: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Geometric SophiaG: momentum over squared gradients, weighted by 1 / (1 + their norm).

        m <- b1 m + (1 - b1) g
        h <- b2 h + (1 - b2) g² / (1 + ‖g‖)                       every update
        θ <- θ - lr (clip(m / (rho h + eps), clip_threshold) + weight_decay θ)

    Args:
      learning_rate: step length of a clipped coordinate, in units of the parameter; a scalar or a
        schedule.
      b1: decay of the momentum.
      b2: decay of h.
      eps: added to rho h; the paper gives no value.
      two_sided: False bounds the ratio only from above, as printed; large negative ratios are then
        unbounded.
      rho: factor on h; None is 1. The paper lists .04 but does not use it.
      clip_threshold: bound on each coordinate's ratio; None is no bound.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that returns
        one.
      mu_dtype: dtype of m; None is the parameter's.
      hessian_dtype: dtype of h; "bfloat16" is rounded stochastically.
      debias_momentum: divide m by 1 - b1^t.
      debias_hessian: divide h by 1 - b2^t.
      seed: seed of the stochastic rounding of a bfloat16 h.
      statistics: measure the clipped and floored fractions at every update, on 1/64 of the
        coordinates.
      max_norm: bound on the norm ‖g‖ of the gradient that m and h average, as with
        `optax.clip_by_global_norm` in front. It saves a pass over the gradient, whose norm h needs
        anyway (44 bytes per parameter instead of 56). None is no bound.

    Extra arguments of `update`:
      hessian: a curvature sample made outside, which is used instead.
      refresh: False keeps h as it is; otherwise h changes at every update.

    Returns:
      A transformation. Its state holds m, h and scalars (`ClipByRatioState`).

    Raises:
      ValueError: an argument is out of range.

    Source: SophiaG by a weighted empirical Fisher ("geometric"), equations 1 to 3. In print it
    shares its name with `sophia_g`, which is another method.

    >>> import jax.numpy as jnp
    >>> tx = sophia_geometric(.1)
    >>> g = jnp.array([3., -4.])
    >>> print(jnp.array_str(tx.update(g, tx.init(g), g)[0], precision=2))
    [-0.1  0.1]
    """
    check_averages(b1, b2, mu_dtype, hessian_dtype)
    momentum = ema(b1, debias=debias_momentum, accumulator_dtype=mu_dtype)
    if max_norm is not None:
        clip = optax.stateless(lambda g, _: bounded(g, max_norm)[0])
        momentum = optax.chain(clip, momentum)
    return optax.chain(
        clip_by_ratio(
            momentum,
            hessian_estimate(
                weighted_squared_gradient(max_norm=max_norm),
                decay=b2,
                update_interval=1,
                bias_correction=debias_hessian,
                seed=seed,
                dtype=hessian_dtype,
            ),
            denominator=shift(eps, 1.0 if rho is None else rho),
            clip_threshold=clip_threshold,
            two_sided=two_sided,
            statistics=statistics,
        ),
        *decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
    )
