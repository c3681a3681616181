"""Optimizers, each one sentence of composition."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sophia_optax import checks
from sophia_optax.estimators.base import Estimator
from sophia_optax.estimators.gauss_newton import gauss_newton_bartlett
from sophia_optax.estimators.gradient import bounded, gradient_magnitude, weighted_squared_gradient
from sophia_optax.estimators.hutchinson import hutchinson
from sophia_optax.sharding import AxisName
from sophia_optax.transforms.blocks import scale_by_blocks
from sophia_optax.transforms.clip_by_ratio import clip_by_ratio, floor, rms_floor, shift
from sophia_optax.transforms.hessian_estimate import hessian_estimate
from sophia_optax.transforms.moments import (
    centered_second_moment,
    first_moment,
    ratio_of_sums,
    second_moment,
    sum_of_ratios,
)
from sophia_optax.transforms.trust_region import trust_region

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike
Mask = Any | Callable[[optax.Params], Any] | None


def _decay_and_rate(
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
    learning_rate: optax.ScalarOrSchedule,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Decoupled decay, then the learning rate: the last two links of every optimizer here."""
    numbers = {"weight_decay": weight_decay, "learning_rate": learning_rate}
    for name, x in numbers.items():
        if not callable(x):  # optax takes a rate of None for +1: a step uphill
            checks.real_number(name, x)
            checks.finite(**{name: x})
    decay = optax.add_decayed_weights(weight_decay, mask)
    if isinstance(weight_decay, int | float) and weight_decay == 0:  # params are not needed then
        decay = optax.GradientTransformation(
            decay.init, lambda updates, state, params=None: (updates, state)
        )
    return decay, optax.scale_by_learning_rate(learning_rate)


def _check_averages(b1: Any, b2: Any, mu_dtype: Any, hessian_dtype: Any) -> None:
    checks.decays(b1=b1, b2=b2)
    checks.momentum_dtype("mu_dtype", mu_dtype)
    checks.curvature_dtype("hessian_dtype", hessian_dtype)


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
      learning_rate: step of a clipped coordinate, in units of the parameter; scalar or schedule.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the curvature per refresh, in [0, 1).
      eps: floor of the denominator.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that makes it.
      gamma: factor on h; larger means fewer clipped coordinates. A clipped step is the learning
        rate long, another one is (learning_rate / gamma) Newton steps. The authors advise a share
        of .1 to .5 of coordinates that are not clipped (`diagnostics`: "win_rate").
      clip_threshold: bound on each coordinate's ratio; None is no bound.
      update_interval: k, updates between curvature samples.
      mu_dtype: dtype of m; None is the parameter's. bfloat16 rounds to nearest (`first_moment`).
      hessian_dtype: dtype of h; None is float32 (float64 for float64 parameters). "bfloat16" is
        rounded stochastically.
      debias_momentum: divide m by 1 - b1^t.
      debias_hessian: divide h by the weight of its samples. Without it h is at 33% of its level
        after 400 updates, and nearly everything is clipped until then.
      seed: of the probes.
      statistics: take the clipped and floored fractions on refreshes, on a sample of 1/64 of the
        coordinates (`clip_by_ratio`).
      estimator: None is `hutchinson()`; pass `hutchinson(num_samples=2, batch_fraction=.25)`, or
        any other estimator, to change how curvature is sampled.
      axis_name: axis of an enclosing `shard_map`.

    Extra arguments of `update`:
      obj_fn: `params -> scalar`, the mean loss of this step's batch; `(params, inputs)` when
        `inputs` is passed (see `hutchinson`).
      hessian: a curvature sample made outside, used instead, at once unless `refresh` says no.
      refresh: None (by the counter), or a bool (see `hessian_estimate`).

    Returns:
      A transformation. Its state holds m, h and scalars (`ClipByRatioState`).

    Raises:
      ValueError: an argument is out of range, or `obj_fn` is missing at a refresh.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 3. The paper corrects no bias: pass
    `debias_momentum=False, debias_hessian=False` for its letter, with `hutchinson(probe="normal")`.
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
    _check_averages(b1, b2, mu_dtype, hessian_dtype)
    return optax.chain(
        clip_by_ratio(
            first_moment(b1, bias_correction=debias_momentum, dtype=mu_dtype),
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
        *_decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
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

    The update of `sophia_h`, with labels drawn from the model instead of probes:

        h <- b2 h + (1 - b2) (1/B) Σ_m s_m ⊙ s_m                  every k updates

    Args:
      learning_rate: as in `sophia_h`, like all arguments but these two.
      b1: decay of the momentum.
      b2: decay of the curvature per refresh.
      eps: floor of the denominator.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that makes it.
      gamma: factor on h; .05 is the paper's for this estimator.
      clip_threshold: bound on each coordinate's ratio; None is no bound.
      update_interval: k, updates between curvature samples.
      mu_dtype: dtype of m; None is the parameter's.
      hessian_dtype: dtype of h; "bfloat16" is rounded stochastically.
      debias_momentum: divide m by 1 - b1^t.
      debias_hessian: divide h by the weight of its samples.
      seed: of the sampled labels.
      statistics: take the clipped and floored fractions on refreshes.
      estimator: None is `gauss_newton_bartlett()`, one categorical group, the paper's; pass
        `gauss_newton_bartlett(groups=16)` with `inputs=` for less variance at equal cost.
      axis_name: axis of an enclosing `shard_map`.

    Extra arguments of `update`:
      logits_fn: `params -> float[B, ..., V]`; `(params, inputs)` when `inputs` is passed (see
        `gauss_newton_bartlett` for `inputs`, `weights`, `sampled_loss_fn`).
      hessian: a curvature sample made outside, used instead, at once unless `refresh` says no.
      refresh: None (by the counter), or a bool (see `hessian_estimate`).

    Returns:
      A transformation. Its state holds m, h and scalars (`ClipByRatioState`).

    Raises:
      ValueError: an argument is out of range, or `logits_fn` is missing at a refresh.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithms 2 and 3; `sophia_h` on bias correction.

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
    r"""Sophia-Lite: momentum over the mean magnitude of the gradient, an L1 Adam.

        m <- b1 m + (1 - b1) g
        h <- b2 h + (1 - b2) |g|                                  every k updates
        θ <- θ - lr (clip(m / (h + eps), clip_threshold) + weight_decay θ)

    Args:
      learning_rate: step of a clipped coordinate; scalar or schedule.
      b1: decay of the momentum; the paper does not give it.
      b2: decay of h, per refresh.
      eps: added to h.
      clip_threshold: bound on each coordinate's ratio, the paper's γ; None is no bound.
      update_interval: k, updates between samples of |g|; they are free, so 1.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that makes it.
      mu_dtype: dtype of m; None is the parameter's.
      hessian_dtype: dtype of h; "bfloat16" is rounded stochastically.
      debias_momentum: divide m by 1 - b1^t.
      debias_hessian: divide h by the weight of its samples.
      seed: of the rounding of a bfloat16 h.
      statistics: take the clipped and floored fractions on refreshes, of 1/64 of the coordinates:
        on every update if k = 1.

    Extra arguments of `update`:
      hessian: a sample made outside, used instead.
      refresh: None (by the counter), or a bool (see `hessian_estimate`).

    Returns:
      A transformation. Its state holds m and h, as many bytes a parameter as AdamW's.

    Raises:
      ValueError: an argument is out of range.

    Source: Sophia-Lite, equations 1 to 3. Its letter is `update_interval=20,
    debias_momentum=False, debias_hessian=False`: h then starts near 0, and much is clipped.

    >>> import jax.numpy as jnp
    >>> tx = sophia_lite(.1)
    >>> g = jnp.array([3., -.5])
    >>> print(jnp.array_str(tx.update(g, tx.init(g), g)[0], precision=2))
    [-0.1  0.1]
    """
    _check_averages(b1, b2, mu_dtype, hessian_dtype)
    return optax.chain(
        clip_by_ratio(
            first_moment(b1, bias_correction=debias_momentum, dtype=mu_dtype),
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
        *_decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
    )


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
    r"""Geometric SophiaG: momentum over squared gradients weighted by the inverse of their norm.

        m <- b1 m + (1 - b1) g
        h <- b2 h + (1 - b2) g² / (1 + ‖g‖)                       every update
        θ <- θ - lr (clip(m / (rho h + eps), clip_threshold) + weight_decay θ)

    Args:
      learning_rate: step of a clipped coordinate; scalar or schedule.
      b1: decay of the momentum.
      b2: decay of h.
      eps: added to rho h; the paper does not give it.
      two_sided: False bounds the ratio only from above, as printed: large negative ratios then
        run away.
      rho: factor on h; None is 1. The paper lists .04 and does not use it.
      clip_threshold: bound on each coordinate's ratio; None is no bound.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that makes it.
      mu_dtype: dtype of m; None is the parameter's.
      hessian_dtype: dtype of h; "bfloat16" is rounded stochastically.
      debias_momentum: divide m by 1 - b1^t.
      debias_hessian: divide h by 1 - b2^t.
      seed: of the rounding of a bfloat16 h.
      statistics: take the clipped and floored fractions of 1/64 of the coordinates, on every
        update.
      max_norm: bound on ‖g‖, the norm of the gradient that m and h are made of, as by
        `optax.clip_by_global_norm` in front, but for its pass over the gradient: the norm of h is
        taken anyhow (44 bytes a parameter instead of 56). None is no bound.

    Extra arguments of `update`:
      hessian: a sample made outside, used instead.
      refresh: False leaves h as it is; else h changes on every update.

    Returns:
      A transformation. Its state holds m, h and scalars (`ClipByRatioState`).

    Raises:
      ValueError: an argument is out of range.

    Source: SophiaG by a weighted empirical Fisher ("geometric"), equations 1 to 3. It is not
    `sophia_g`, whose name it shares in print.

    >>> import jax.numpy as jnp
    >>> tx = sophia_geometric(.1)
    >>> g = jnp.array([3., -4.])
    >>> print(jnp.array_str(tx.update(g, tx.init(g), g)[0], precision=2))
    [-0.1  0.1]
    """
    _check_averages(b1, b2, mu_dtype, hessian_dtype)
    momentum = first_moment(b1, bias_correction=debias_momentum, dtype=mu_dtype)
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
        *_decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
    )


def orthosoph(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.0,
    eps: ArrayLike = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    weight_decay_mask: Mask = None,
    block_size: int = 128,
    update_interval: ArrayLike = 1,
    form: str = "rows",
    b2_numbers: ArrayLike = 0.95,
    mu_dtype: DTypeLike | None = "bfloat16",
    rms: ArrayLike | None = 0.2,
    nesterov: bool = True,
    block_mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""OrthoSoph: momentum orthogonalised in blocks of rows, or whitened by tiles.

        M <- b1 M + (1 - b1) G,  N = b1 M + (1 - b1) G, both corrected for their bias
        C <- b2 C + (1 - b2) N Nᵀ / c
        θ <- θ - lr (scaled to rms: (C + eps ‖C‖_F I)^(-1/2) N, + weight_decay θ)

    for each group of b rows of a matrix whose rows are its c long. Numbers that are in no matrix
    take Adam's direction. With one block a matrix this is Muon; smaller blocks cost fewer
    operations (a fourteenth of Muon's at 768 x 768 and b = 128), and stay within a device where b
    divides its rows.

    Args:
      learning_rate: times `rms`, the root mean square change of a matrix's elements, in units of
        the parameter; scalar or schedule. AdamW's fit.
      b1: decay of the momentum, in [0, 1).
      b2: decay of C, in [0, 1), per update.
      eps: ridge, relative with rows, absolute with tiles; at least 4 b ulp ‖C‖_F, which float32
        cannot see below (6e-5 ‖C‖_F for b = 128).
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that makes it.
      block_size: b. The longer the better, up to the shorter side.
      update_interval: updates between inverse square roots.
      form: "rows", or "tiles" for the paper's tiles of b x b.
      b2_numbers: with rows, decay of the second moment of what is in no matrix.
      mu_dtype: dtype of M; None is the parameter's.
      rms: root mean square of each matrix's direction; None leaves it (see `scale_by_blocks`).
      nesterov: N as above; False takes M for N.
      block_mask: which leaves hold matrices in their last two axes; pytree of bools, or a function
        of params that makes it; None is all leaves of two axes or more.

    Extra arguments of `update`:
      refresh: None (by the counter), or a bool: whether to take roots now. Ignored at
        `update_interval=1`.

    Returns:
      A transformation. Its state holds M, and C and the roots where they are used again
      (`ScaleByBlocksState`): a quarter of AdamW's bytes for GPT-2 125M with the defaults.

    Raises:
      ValueError: an argument is out of range, or `block_mask` marks a leaf that holds no matrix.
      TypeError: `block_size` is traced.

    Source: "OrthoSoph: Analyzing Trade-offs in Memory-Efficient Second-Order Optimization", 2025.
    It prints no update. Its tiles, each with its own b x b curvature, are read as `form="tiles",
    b2=.99, rms=None, mu_dtype=None, eps=1e-8, nesterov=False`: (C + eps I)^(-1/2) M with C <- b2 C
    + (1 - b2) G Gᵀ. They keep as many numbers as Adam. Rows are ours; C of gradients instead of
    momentum was worse (LOG.md).
    To inject hyperparameters: `optax.inject_hyperparams(orthosoph, static_args=("block_size",
    "block_mask", "weight_decay_mask", "b2", "update_interval"),
    hyperparam_dtype=jnp.float32)(...)`.
    With the last two traced C and the roots are kept.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda w: jnp.sum((w - jnp.eye(2)) ** 2)
    >>> w, tx = jnp.zeros((2, 2)), orthosoph(.2)
    >>> state = tx.init(w)
    >>> @jax.jit
    ... def step(w, state):
    ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
    ...     return optax.apply_updates(w, updates), state
    >>> for _ in range(40):
    ...     w, state = step(w, state)
    >>> print(bool(loss(w) < loss(jnp.zeros((2, 2))) / 10))
    True
    """
    return optax.chain(
        scale_by_blocks(
            b1=b1,
            b2=b2,
            eps=eps,
            block_size=block_size,
            update_interval=update_interval,
            form=form,
            b2_numbers=b2_numbers,
            mu_dtype=mu_dtype,
            rms=rms,
            nesterov=nesterov,
            block_mask=block_mask,
        ),
        *_decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
    )


def soaa(
    learning_rate: optax.ScalarOrSchedule,
    total_steps: ArrayLike,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    gamma: ArrayLike = 0.25,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    hessian_dtype: DTypeLike | None = None,
    rule: str = "soaa",
    loss_correction: str = "seen",
) -> optax.GradientTransformationExtraArgs:
    r"""SOAA: Adam, or a Newton step on a Fisher diagonal, inside an adaptive trust region.

        m̂, ŝ = Adam's moments, bias-corrected
        F = (1 + Σ m̂² / Σ (ŝ + eps)) ŝ                            rule "soaa"
        F = (1 + Σ (m̂² / (v̂ + eps))) v̂, v̂ the centered moment     rule "tadam"
        a = r m̂ / (max(r F, sqrt(ŝ)) + eps)
        θ <- θ - lr (a + weight_decay θ)

    with the radius r of `trust_region`. At the gradient scale of language models sqrt(ŝ) > r F
    everywhere, and this is Adam times r.

    Args:
      learning_rate: scalar or schedule.
      total_steps: T, the length of the run, over which the bounds of r close in.
      b1: decay of the momentum and of the average loss.
      b2: decay of the second moment.
      gamma: width of the bounds of r.
      eps: added to the denominators, and floor of the predicted reduction; above 0.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that makes it.
      mu_dtype: dtype of m; None is the parameter's.
      hessian_dtype: dtype of the second moments; "bfloat16" is rounded stochastically.
      rule: "soaa" (algorithm 1 as printed) or "tadam" (its parent; one more moment to keep).
      loss_correction: how the average loss is corrected where updates bring no `value`: "seen" by
        the losses that came, "steps" by 1 - b1^t as printed.

    Extra arguments of `update`:
      value: the loss of this step, a scalar; without it r stays. Under `optax.MultiSteps` the last
        micro-step's is read: pass the mean of the micro-steps.

    Returns:
      A transformation. Its state holds the moments and r (`TrustRegionState`).

    Raises:
      ValueError: an argument is out of range.

    Source: SOAA, algorithm 1, with v̂, which is used and never updated, read as ŝ; Tadam's
    published code. The paper has no default weight decay.

    >>> import jax.numpy as jnp
    >>> tx = soaa(.1, total_steps=100)
    >>> g = jnp.array([.03, -.04])
    >>> u, state = tx.update(g, tx.init(g), g, value=2.)
    >>> print(jnp.array_str(u, precision=2), state[0].radius)
    [-0.1  0.1] 1.0
    """
    _check_averages(b1, b2, mu_dtype, hessian_dtype)
    adam = second_moment(b2, dtype=hessian_dtype)
    centered = rule == "tadam"
    return optax.chain(
        trust_region(
            clip_by_ratio(
                first_moment(b1, bias_correction=True, dtype=mu_dtype),
                centered_second_moment(b1, b2, eps, dtype=hessian_dtype) if centered else adam,
                second_moment=adam if centered else None,
                gain=sum_of_ratios(eps) if centered else ratio_of_sums(eps),
                denominator=rms_floor(1.0, eps),
                clip_threshold=None,
            ),
            learning_rate,
            total_steps=total_steps,
            b1=b1,
            eps=eps,
            gamma=gamma,
            rule=rule,
            loss_correction=loss_correction,
        ),
        *_decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
    )
