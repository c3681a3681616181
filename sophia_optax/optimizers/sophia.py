"""Sophia: momentum over a sampled diagonal of the curvature, clipped coordinate by coordinate."""

import jax
import optax

from sophia_optax.estimators.base import Estimator
from sophia_optax.estimators.gauss_newton import gauss_newton_bartlett
from sophia_optax.estimators.hutchinson import hutchinson
from sophia_optax.optimizers.decay_and_rate import Mask, check_averages, decay_and_rate
from sophia_optax.sharding import AxisName
from sophia_optax.transforms.clip_by_ratio import clip_by_ratio
from sophia_optax.transforms.denominators import floor
from sophia_optax.transforms.hessian_estimate import hessian_estimate
from sophia_optax.transforms.moments import ema

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


def sophia_h(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.965,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    weight_decay_mask: Mask = None,
    gamma: ArrayLike = 0.01,
    clip_threshold: ArrayLike | None = 1.0,
    update_interval: ArrayLike = 10,
    mu_dtype: DTypeLike | None = None,
    hessian_dtype: DTypeLike | None = None,
    debias_momentum: bool = True,
    debias_hessian: bool = True,
    seed: ArrayLike = 0,
    statistics: bool = True,
    estimator: Estimator | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia with Hutchinson's estimate of the diagonal of the Hessian.

        m <- b1 m + (1 - b1) g
        h <- b2 h + (1 - b2) u ⊙ (H u)                            every k updates
        θ <- θ - lr (clip(m / max(gamma h, eps), clip_threshold) + weight_decay θ)

    Args:
      learning_rate: step length of a clipped coordinate, in units of the parameter; a scalar or a
        schedule.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the curvature per refresh, in [0, 1).
      eps: floor of the denominator.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that returns
        one.
      gamma: factor on h; a larger one clips fewer coordinates. A clipped coordinate moves by
        learning_rate, any other by learning_rate / gamma Newton steps. The authors advise that a
        fraction of .1 to .5 of the coordinates is not clipped (`diagnostics`: "win_rate").
      clip_threshold: bound on each coordinate's ratio; None is no bound.
      update_interval: k, updates between curvature samples.
      mu_dtype: dtype of m; None is the parameter's. "bfloat16" is rounded to nearest (`ema`).
      hessian_dtype: dtype of h; None is float32, or float64 where the parameter is. "bfloat16" is
        rounded stochastically.
      debias_momentum: divide m by 1 - b1^t.
      debias_hessian: divide h by the total weight of its samples. Without it h reaches 33% of its
        level after 400 updates, and nearly all coordinates are clipped until then.
      seed: seed of the probes.
      statistics: measure the clipped and floored fractions at refreshes, on 1/64 of the coordinates
        (`clip_by_ratio`).
      estimator: how curvature is sampled. None is `hutchinson()`; others are
        `hutchinson(num_samples=2, batch_fraction=.25)` or any `Estimator`.
      axis_name: axis of an enclosing `shard_map`.

    Extra arguments of `update`:
      obj_fn: `params -> scalar`, the mean loss over this step's batch, or `(params, inputs) ->
        scalar` if `inputs` is passed (see `hutchinson`).
      hessian: a curvature sample made outside, which is used instead. It is averaged at once
        unless `refresh` is False.
      refresh: None (the counter decides) or a bool (see `hessian_estimate`).

    Returns:
      A transformation. Its state holds m, h and scalars (`ClipByRatioState`).

    Raises:
      ValueError: an argument is out of range, or `obj_fn` is missing at a refresh.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 3. The paper corrects no bias and has
    normal probes: for its exact form pass `debias_momentum=False, debias_hessian=False,
    estimator=hutchinson(probe="normal")`.
    To inject hyperparameters: `optax.inject_hyperparams(sophia_h, static_args=("estimator",
    "weight_decay_mask"), hyperparam_dtype=jnp.float32)(...)`.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda x: jnp.sum((x - 1) ** 2)
    >>> x, tx = jnp.zeros(2), sophia_h(.05, b1=.9)
    >>> state = tx.init(x)
    >>> @jax.jit
    ... def step(x, state):
    ...     updates, state = tx.update(jax.grad(loss)(x), state, x, obj_fn=loss)
    ...     return optax.apply_updates(x, updates), state
    >>> for _ in range(20):
    ...     x, state = step(x, state)
    >>> print(bool(loss(x) < loss(jnp.zeros(2)) / 10))
    True
    """
    check_averages(b1, b2, mu_dtype, hessian_dtype)
    return optax.chain(
        clip_by_ratio(
            ema(b1, debias=debias_momentum, accumulator_dtype=mu_dtype),
            hessian_estimate(
                hutchinson() if estimator is None else estimator,
                decay=b2,
                update_interval=update_interval,
                bias_correction=debias_hessian,
                seed=seed,
                dtype=hessian_dtype,
                axis_name=axis_name,
            ),
            denominator=floor(gamma, eps),
            clip_threshold=clip_threshold,
            statistics=statistics,
        ),
        *decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
    )


def sophia_g(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.965,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    weight_decay_mask: Mask = None,
    gamma: ArrayLike = 0.05,
    clip_threshold: ArrayLike | None = 1.0,
    update_interval: ArrayLike = 10,
    mu_dtype: DTypeLike | None = None,
    hessian_dtype: DTypeLike | None = None,
    debias_momentum: bool = True,
    debias_hessian: bool = True,
    seed: ArrayLike = 0,
    statistics: bool = True,
    estimator: Estimator | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia with the Gauss-Newton-Bartlett estimate of the Gauss-Newton diagonal.

    The update of `sophia_h`, with h estimated from labels that are drawn from the model. s_m is
    the summed gradient of the sampled losses of row group m, and B counts the outputs:

        h <- b2 h + (1 - b2) (1/B) Σ_m s_m ⊙ s_m                  every k updates

    Args:
      learning_rate: step length of a clipped coordinate, in units of the parameter; a scalar or a
        schedule. All arguments mean what they do in `sophia_h`; the defaults of gamma and
        estimator differ.
      b1: decay of the momentum.
      b2: decay of the curvature per refresh.
      eps: floor of the denominator.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that returns
        one.
      gamma: factor on h; .05 is the paper's value for this estimator.
      clip_threshold: bound on each coordinate's ratio; None is no bound.
      update_interval: k, updates between curvature samples.
      mu_dtype: dtype of m; None is the parameter's.
      hessian_dtype: dtype of h; "bfloat16" is rounded stochastically.
      debias_momentum: divide m by 1 - b1^t.
      debias_hessian: divide h by the total weight of its samples.
      seed: seed of the sampled labels.
      statistics: measure the clipped and floored fractions at refreshes.
      estimator: None is `gauss_newton_bartlett()`, the paper's: categorical labels in one group.
        `gauss_newton_bartlett(groups=16)`, with `inputs`, has less variance at equal cost.
      axis_name: axis of an enclosing `shard_map`.

    Extra arguments of `update`:
      logits_fn: `params -> float[B, ..., V]`, or `(params, inputs) -> float[B, ..., V]` if `inputs`
        is passed (see `gauss_newton_bartlett`, also for `weights` and `sampled_loss_fn`).
      hessian: a curvature sample made outside, which is used instead. It is averaged at once
        unless `refresh` is False.
      refresh: None (the counter decides) or a bool (see `hessian_estimate`).

    Returns:
      A transformation. Its state holds m, h and scalars (`ClipByRatioState`).

    Raises:
      ValueError: an argument is out of range, or `logits_fn` is missing at a refresh.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithms 2 and 3. `sophia_h` says where the
    bias correction departs from it.

    >>> import jax, jax.numpy as jnp, optax
    >>> x, y = jnp.eye(4), jnp.arange(4)
    >>> logits_fn = lambda w: x @ w
    >>> loss = lambda w: optax.softmax_cross_entropy_with_integer_labels(logits_fn(w), y).mean()
    >>> w, tx = jnp.zeros((4, 4)), sophia_g(.1)
    >>> state = tx.init(w)
    >>> @jax.jit
    ... def step(w, state):
    ...     updates, state = tx.update(jax.grad(loss)(w), state, w, logits_fn=logits_fn)
    ...     return optax.apply_updates(w, updates), state
    >>> for _ in range(20):
    ...     w, state = step(w, state)
    >>> print(bool(loss(w) < loss(jnp.zeros((4, 4))) / 2))
    True
    """
    return sophia_h(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        gamma=gamma,
        clip_threshold=clip_threshold,
        update_interval=update_interval,
        mu_dtype=mu_dtype,
        hessian_dtype=hessian_dtype,
        debias_momentum=debias_momentum,
        debias_hessian=debias_hessian,
        seed=seed,
        statistics=statistics,
        estimator=gauss_newton_bartlett() if estimator is None else estimator,
        axis_name=axis_name,
    )
