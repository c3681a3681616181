"""Gauss-Newton-Bartlett: the Gauss-Newton diagonal from labels that the model itself draws."""

import functools

from sophia_optax import checks
from sophia_optax.estimators.base import Estimator, Sampler
from sophia_optax.estimators.gauss_newton_sample import (
    OWNER,
    Settings,
    sample,
    sample_with_gradient,
)
from sophia_optax.estimators.likelihood import SAMPLED_LOSSES, check_variance
from sophia_optax.estimators.rows import check_fraction
from sophia_optax.sharding import AxisName


def gauss_newton_bartlett(
    *,
    likelihood: str = "categorical",
    groups: int = 1,
    batch_fraction: float = 1.0,
    num_samples: int = 1,
    parallel_groups: int = 1,
    spmd_axis_name: AxisName = None,
    variance: float = 1.0,
    shards: int | None = None,
) -> Estimator:
    r"""Gauss-Newton-Bartlett estimator of the diagonal of the Gauss-Newton matrix.

        h = (1/B) Σ_m s_m ⊙ s_m,    B = Σ w

    Labels are drawn from the model's own predictions. s_m is the gradient of the summed loss of
    group m on these labels, with the cotangent of each output multiplied by sqrt(w). With one
    group, h is the paper's B ĝ ⊙ ĝ, whose relative variance is about 2 for any batch size. More
    groups take the same number of floating-point operations, leave h unbiased, and divide the
    variance by up to the number of groups.

    Args:
      likelihood: "categorical" (softmax over the last axis, which B does not count), "bernoulli"
        (element-wise sigmoid, B counts elements), or "gaussian" (½ Σ (y-f)² / variance over the
        last axis, B counts the leading elements).
      groups: number of equal groups of consecutive rows, each squared by itself; more than 1 needs
        `inputs`. The mean of the samples of M micro-batches of equal B is a sample with M times as
        many groups.
      batch_fraction: fraction of the rows of `inputs` that are sampled: every n-th row,
        n = round(1 / batch_fraction).
      num_samples: independent draws of all labels, averaged into one sample. All draws share one
        forward pass; each costs a backward pass.
      parallel_groups: number of groups that run at once, in rounds until all have run. Choose a
        multiple of the number of devices over which the batch is sharded. If it does not divide
        `groups`, the last round has idle slots. With fewer sampled rows than devices, use one row
        per group. The value changes speed and memory, never h. Each round reduces the squares over
        devices once more, so run all groups at once if a device has memory for the gradients of
        one layer from `parallel_groups / devices` groups. Inside `shard_map`, and on explicit mesh
        axes, it has no effect: groups run one after the other.
      spmd_axis_name: mesh axes of the batch, over which parallel groups are spread; as in
        `jax.vmap`. A sharding constraint inside `logits_fn` then applies to the rows of one group,
        which lie on one device, so it must not name these axes (`PartitionSpec()` keeps
        activations with their rows).
      variance: variance of the noise of "gaussian"; h is divided by it. It says how your loss
        reduces squared errors: 1 for `mean(sum(½ (y-f)², -1))`, ½ without the ½; with V outputs a
        row, V / 2 for `mean((y-f)²)` over all elements, and V for `mean(optax.l2_loss(f, y))`.
      shards: deprecated name of `parallel_groups`.

    Extra arguments of `update`:
      logits_fn: `params -> float[B, ..., V]`, or `(params, inputs)` if `inputs` is passed. With
        "categorical" it may return `LinearLogits`, which are never held whole.
      sampled_loss_fn: in place of `logits_fn`, `(params, inputs, key) -> (summed loss on labels
        drawn from the model, number of counted outputs)`, for losses that never hold all logits.
        It weighs its own outputs, each cotangent times sqrt(w).
      inputs: pytree whose leaves lead with the batch axis. A leaf may also be a typed PRNG key of
        shape (), for dropout: each group gets a key of its own from it.
      weights: `float[B, ...]`, shaped as what B counts: 1 for an output that counts, 0 for padding.
        All ones by default.
      row_numbers: `int32[B]`, 0, 1, ... by default: the numbers of the rows in a batch that is
        evaluated in parts with one key. If part i of K equal parts has the rows i, i + K, ..., and
        each row is a group, the mean of the K samples equals the sample of the whole batch, to
        rounding.

    Returns:
      An estimator, which `value_grad_and_hessian` accepts. A label depends on the key and the
      number of its row alone, so neither the mesh nor the number of groups changes it (a
      `sampled_loss_fn` gets one key per group, from the group's first row number). Under
      `axis_name` each shard groups its own rows and draws its own labels; squares and B are summed
      over the shards. If nothing counts (B = 0), the sample is not finite, and `hessian_estimate`
      rejects it. Batch normalisation by the statistics of a group needs groups of many rows: a
      single row is normalised to 0, and h is 0 (docs/recipes.md). With jaxlib 0.10.2 on CPU,
      `jax.vmap` over hundreds of keys computes layer norm wrongly: use `num_samples` or
      `jax.lax.map`.

    Raises:
      ValueError: an argument is out of range; `logits_fn` and `sampled_loss_fn` are both missing;
        `groups` or `batch_fraction` is set without `inputs`; `groups` does not divide the rows;
        `weights` or `row_numbers` has a wrong shape; params are masked; there is one class, whose
        softmax is always 1; the batch is split over an axis of a `shard_map` that `axis_name` does
        not name; with `spmd_axis_name`, `parallel_groups` does not divide the rows whose gradient
        is taken with the sample.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 2; groups and weights are ours.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[1.], [2.], [3.], [4.]])
    >>> logits_fn = lambda params, x: x * params                 # Bernoulli: diag = mean p(1-p)x²
    >>> gnb = gauss_newton_bartlett(likelihood="bernoulli", groups=4, num_samples=4000)
    >>> h = gnb(jax.random.key(0), jnp.zeros(1), None, logits_fn=logits_fn, inputs=x)
    >>> print(jnp.round(h, 1))                                   # 0.25 * (1 + 4 + 9 + 16) / 4
    [1.9]
    """
    old = ("shards", shards)
    parallel_groups = checks.renamed(OWNER, *old, "parallel_groups", parallel_groups, 1)
    settings = Settings(
        likelihood, groups, batch_fraction, num_samples, parallel_groups, spmd_axis_name, variance
    )
    _check_settings(settings)
    return Sampler(
        OWNER,
        functools.partial(sample, settings),
        functools.partial(sample_with_gradient, settings),
    )


def _check_settings(settings: Settings) -> None:
    likelihood, groups, batch_fraction, _, parallel_groups, spmd_axis_name, variance = settings
    checks.one_of("likelihood", likelihood, tuple(SAMPLED_LOSSES))
    check_variance(likelihood, variance)
    for name in ("groups", "num_samples", "parallel_groups"):
        checks.positive_integer(name, getattr(settings, name))
    check_fraction(batch_fraction)
    if groups == 1 and parallel_groups > 1:
        raise ValueError(
            f"parallel_groups={parallel_groups} needs several groups, but groups=1 takes all rows "
            "as one group. Set `groups`, or leave `parallel_groups` out."
        )
    if spmd_axis_name is not None and parallel_groups == 1:
        raise ValueError(
            f"spmd_axis_name={spmd_axis_name!r} spreads groups that run in parallel, but "
            "parallel_groups=1. Set `parallel_groups` to a multiple of the number of devices on "
            "these axes, or leave `spmd_axis_name` out."
        )
