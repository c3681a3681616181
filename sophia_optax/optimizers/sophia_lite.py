"""Sophia-Lite: momentum over the mean magnitude of the gradient."""

import jax
import optax

from sophia_optax.estimators.gradient import gradient_magnitude
from sophia_optax.optimizers.decay_and_rate import Mask, check_averages, decay_and_rate
from sophia_optax.transforms.clip_by_ratio import clip_by_ratio
from sophia_optax.transforms.denominators import shift
from sophia_optax.transforms.hessian_estimate import hessian_estimate
from sophia_optax.transforms.moments import ema

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


def sophia_lite(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    clip_threshold: ArrayLike | None = 1.0,
    update_interval: ArrayLike = 1,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    hessian_dtype: DTypeLike | None = None,
    debias_momentum: bool = True,
    debias_hessian: bool = True,
    seed: ArrayLike = 0,
    statistics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia-Lite: momentum over the mean magnitude of the gradient, Adam with an L1 norm.

        m <- b1 m + (1 - b1) g
        h <- b2 h + (1 - b2) |g|                                  every k updates
        θ <- θ - lr (clip(m / (h + eps), clip_threshold) + weight_decay θ)

    Args:
      learning_rate: step length of a clipped coordinate, in units of the parameter; a scalar or a
        schedule.
      b1: decay of the momentum; the paper gives no value.
      b2: decay of h, per refresh.
      eps: added to h.
      clip_threshold: bound on each coordinate's ratio, the paper's γ; None is no bound.
      update_interval: k, updates between samples of |g|; 1 by default, since they cost nothing.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that returns
        one.
      mu_dtype: dtype of m; None is the parameter's.
      hessian_dtype: dtype of h; "bfloat16" is rounded stochastically.
      debias_momentum: divide m by 1 - b1^t.
      debias_hessian: divide h by the total weight of its samples.
      seed: seed of the stochastic rounding of a bfloat16 h.
      statistics: measure the clipped and floored fractions at refreshes (at every update if k = 1),
        on 1/64 of the coordinates.

    Extra arguments of `update`:
      hessian: a curvature sample made outside, which is used instead.
      refresh: None (the counter decides) or a bool (see `hessian_estimate`).

    Returns:
      A transformation. Its state (`ClipByRatioState`) holds m and h, as many bytes per parameter as
      AdamW's.

    Raises:
      ValueError: an argument is out of range.

    Source: Sophia-Lite, equations 1 to 3. For the paper's exact form pass `update_interval=20,
    debias_momentum=False, debias_hessian=False`: h then starts near 0 and clips many coordinates.

    >>> import jax.numpy as jnp
    >>> tx = sophia_lite(.1)
    >>> g = jnp.array([3., -.5])
    >>> print(jnp.array_str(tx.update(g, tx.init(g), g)[0], precision=2))
    [-0.1  0.1]
    """
    check_averages(b1, b2, mu_dtype, hessian_dtype)
    return optax.chain(
        clip_by_ratio(
            ema(b1, debias=debias_momentum, accumulator_dtype=mu_dtype),
            hessian_estimate(
                gradient_magnitude(),
                decay=b2,
                update_interval=update_interval,
                bias_correction=debias_hessian,
                seed=seed,
                dtype=hessian_dtype,
            ),
            denominator=shift(eps),
            clip_threshold=clip_threshold,
            statistics=statistics,
        ),
        *decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
    )
