"""Gauss-Newton-Bartlett: the Gauss-Newton diagonal from labels that the model draws itself."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax import checks
from sophia_optax.estimators.base import Estimator, Sampler, check_params, mean_over_samples
from sophia_optax.estimators.likelihood import (
    SAMPLED_LOSSES,
    Model,
    check_variance,
    gradient_pass,
    logits_pass,
    user_pass,
)
from sophia_optax.estimators.row_groups import (
    check_leads_with_rows,
    join_rows,
    mean_of_parts,
    mean_of_two_states,
    other_rows,
    sampled_rows,
    spread,
    sum_over_groups,
    zero_unless,
)
from sophia_optax.estimators.rows import batch_size, check_fraction, check_stride
from sophia_optax.numerics import widen
from sophia_optax.sharding import (
    AxisName,
    across,
    check_named,
    explicit_mesh,
    manual_axes,
    mean_over_shards,
    varying,
)

OWNER = "gauss_newton_bartlett"
SIDE_BY_SIDE = "sophia_optax.gauss_newton_bartlett"
"""Name of the axis of groups under `jax.vmap`."""


def gauss_newton_bartlett(
    *,
    likelihood: str = "categorical",
    groups: int = 1,
    batch_fraction: float = 1.0,
    num_samples: int = 1,
    shards: int = 1,
    spmd_axis_name: AxisName = None,
    variance: float = 1.0,
) -> Estimator:
    r"""Gauss-Newton-Bartlett estimator of the diagonal of the Gauss-Newton matrix.

        h = (1/B) Σ_m s_m ⊙ s_m,    B = Σ w

    Labels are drawn from the model's own predictions; s_m is the gradient of the summed loss of
    group m on them, each output's cotangent times sqrt(w). One group is the paper's B ĝ ⊙ ĝ,
    whose relative variance is about 2 whatever the batch. More groups cost the same number of
    floating-point operations, stay unbiased, and divide the variance by up to their number.

    Args:
      likelihood: "categorical" (softmax over the last axis, which B does not count), "bernoulli"
        (element-wise sigmoid, B counts elements), or "gaussian" (½ Σ (y-f)² / variance over the
        last axis, B counts the leading elements).
      groups: number of equal sets of consecutive rows that are squared apart; needs `inputs`. The
        mean of samples of M micro-batches of equal B is one of M times as many groups.
      batch_fraction: share of the rows of `inputs` that are used: every n-th row,
        n = round(1 / fraction).
      num_samples: independent draws of all labels, averaged in one sample; each costs a backward
        pass, after one forward pass.
      shards: how many groups run side by side, round after round until all have run; a multiple
        of the number of devices over which the batch is sharded. Where it does not divide the
        groups, places of the last round stay idle: fewer rows than devices are best sampled so,
        a group a row. It changes where and when the work is done, never h. Each round reduces the
        squares over devices anew, so take all groups at once where a device bears
        `shards / devices` gradients of one layer. Inside `shard_map`, and on explicit axes, it
        has no effect: groups run one after the other.
      spmd_axis_name: as in `jax.vmap`: mesh axes over which the groups side by side are spread,
        those of the batch. Sharding constraints inside `logits_fn` apply to the rows of one group
        then, which lie on one device: they name no such axis (`PartitionSpec()` keeps activations
        where their rows are).
      variance: of the noise of "gaussian", which says how the loss reduces squared errors: 1 for
        `mean(sum(½ (y-f)², -1))`, ½ without the ½; V / 2 for `mean((y-f)²)` over all elements of
        V outputs a row, V for `mean(optax.l2_loss(f, y))`. h is divided by it.

    Extra arguments of `update`:
      logits_fn: `params -> float[B, ..., V]`, or `(params, inputs)` when `inputs` is passed; of
        "categorical" it may return `LinearLogits`, which are never held whole.
      sampled_loss_fn: instead of `logits_fn`, `(params, inputs, key) -> (summed loss on labels
        drawn from the model, number of counted outputs)`, for losses that never hold all logits;
        it weighs its own outputs, each cotangent times sqrt(w).
      inputs: pytree whose leaves lead with the batch axis. A leaf may also be a typed PRNG key of
        shape (), for dropout: groups get keys of their own from it.
      weights: `float[B, ...]` shaped as what B counts, 1 where an output counts, 0 for padding;
        default all ones.
      row_numbers: `int32[B]`, default 0, 1, ...: the rows' numbers in a batch that is evaluated
        in parts, each with the same key. The mean of the samples of K equal micro-batches, the
        i-th of rows i, i + K, ..., is then the sample of the whole batch, to rounding, with a
        group a row.

    Returns:
      An estimator, which `value_grad_and_hessian` takes. Labels are functions of (key, number of
      the row), groups of rows: neither the mesh nor the number of groups changes which labels are
      drawn (a `sampled_loss_fn` gets a key for each group instead, by its first number). Under
      `axis_name` each shard groups its own rows and draws apart, and squares and B are summed over
      the shards. If nothing is counted (B = 0) the sample is not finite and `hessian_estimate`
      rejects it. Batch normalisation by the statistics of a group needs groups of many rows: of a
      single row it normalises to 0, and h is 0 (docs/recipes.md). Under `jax.vmap` over hundreds of
      keys jaxlib 0.10.2 on CPU computes layer norm wrongly: take `num_samples` or `jax.lax.map`.

    Raises:
      ValueError: an argument is out of range; neither function is passed; `groups` or
        `batch_fraction` without `inputs`; rows that do not divide into groups; `weights` or
        `row_numbers` of a wrong shape; params are masked; one class, whose softmax is always 1; an
        axis of a `shard_map` that splits the batch and is not named; `shards` that do not divide
        the rows of a gradient taken with the sample, where `spmd_axis_name` spreads them.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 2, extended to groups and weights.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[1.], [2.], [3.], [4.]])
    >>> logits_fn = lambda params, x: x * params                 # Bernoulli: diag = mean p(1-p)x²
    >>> gnb = gauss_newton_bartlett(likelihood="bernoulli", groups=4, num_samples=4000)
    >>> h = gnb(jax.random.key(0), jnp.zeros(1), None, logits_fn=logits_fn, inputs=x)
    >>> print(jnp.round(h, 1))                                   # 0.25 * (1 + 4 + 9 + 16) / 4
    [1.9]
    """
    checks.one_of("likelihood", likelihood, tuple(SAMPLED_LOSSES))
    check_variance(likelihood, variance)
    for name, value in (("groups", groups), ("num_samples", num_samples), ("shards", shards)):
        checks.positive_integer(name, value)
    check_fraction(batch_fraction)
    stride = round(1 / batch_fraction)
    if groups == 1 and shards > 1:
        raise ValueError(f"one group of all rows has no other beside it, but shards={shards}.")
    if spmd_axis_name is not None and shards == 1:
        raise ValueError(
            f"spmd_axis_name={spmd_axis_name!r} spreads groups that run side by side, but shards=1."
            " Set `shards` to a multiple of the number of devices on these axes, or leave it out."
        )

    def check_aux(aux, rows):
        if groups > 1 or stride > 1:
            check_leads_with_rows(aux, batch_size(rows), groups, batch_fraction)

    def differentiate(key, params, forward, rows, axis_name):
        """(sums over groups of `Pass.true`, (auxiliary output, state), h)."""
        if axis_name:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        # JAX gives vmap no way to spread groups over explicit axes, nor to sum them in manual ones.
        alone = axis_name or manual_axes() or explicit_mesh(rows)
        side_by_side = 1 if alone else shards
        beside = SIDE_BY_SIDE if side_by_side > 1 else None

        def group(rows, counts):
            draw, true, aux, state = forward(params, rows)
            check_aux(aux, rows)

            def add_up(tree):
                return across(jax.lax.psum, zero_unless(counts, tree), beside)

            def square(key):
                s, count = draw(key)
                return add_up((jax.tree.map(lambda s: jnp.square(widen(s)), s), count))

            sums = add_up(true), mean_over_samples(square, key, num_samples, axis_name)
            return sums, (aux, state)

        if side_by_side > 1:
            group = jax.vmap(
                group, out_axes=(None, 0), axis_name=beside, spmd_axis_name=spmd_axis_name
            )
        (true, squared), beside_them = sum_over_groups(group, rows, groups, side_by_side, axis_name)
        squares, count = across(jax.lax.psum, squared, axis_name)
        return true, beside_them, jax.tree.map(lambda s: s / count.astype(s.dtype), squares)

    def estimator(
        key,
        params,
        updates,
        *,
        logits_fn=None,
        sampled_loss_fn=None,
        inputs=None,
        weights=None,
        row_numbers=None,
        axis_name=None,
        **unused,
    ):
        del updates, unused
        check_params("gauss_newton_bartlett", params)
        named = functools.partial(check_named, OWNER, params=params, axis_name=axis_name)
        if sampled_loss_fn is None:
            forward = logits_pass(Model(likelihood, logits_fn, named, variance))
        else:
            forward = user_pass(sampled_loss_fn, weights, named)
        rows = sampled_rows(inputs, weights, row_numbers, groups, batch_fraction)
        return differentiate(key, varying(params, axis_name), forward, rows, axis_name)[2]

    def with_gradient(
        key,
        params,
        *,
        has_aux,
        has_state,
        loss_fn=None,
        logits_fn=None,
        sampled_loss_fn=None,
        inputs=None,
        weights=None,
        row_numbers=None,
        axis_name=None,
        **unused,
    ):
        del unused
        check_params("gauss_newton_bartlett", params)
        _check_loss_fn(loss_fn, sampled_loss_fn)
        named = functools.partial(check_named, OWNER, params=params, axis_name=axis_name)
        model = Model(likelihood, logits_fn, named, variance, has_state, loss_fn, has_aux)
        rows = sampled_rows(inputs, weights, row_numbers, groups, batch_fraction)
        here = varying(params, axis_name)
        over_all = model
        manual = axis_name or manual_axes()
        if spmd_axis_name is not None and not manual:
            over_all = model._replace(logits_fn=spread(logits_fn, shards, spmd_axis_name))
        plain = gradient_pass(over_all)
        if groups % shards and not manual:
            # The rows that a shared pass leaves need not divide over the places.
            check_stride(batch_size((inputs, weights)), stride)
            true, (aux, model_state) = plain(here, (inputs, weights, row_numbers))
            check_aux(aux, (inputs, weights))
            sampled = logits_pass(model._replace(loss_fn=None))
            h = differentiate(key, here, sampled, rows, axis_name)[2]
        else:
            true, (aux, model_state), h = differentiate(
                key, here, logits_pass(model), rows, axis_name
            )
            if stride > 1:
                rest = other_rows(inputs, weights, row_numbers, stride)
                others, (other_aux, other_state) = plain(here, rest)
                check_aux(other_aux, rest)
                true = mean_of_parts(true, others, groups, stride)
                aux = join_rows(aux, other_aux, batch_size(rows))
                model_state = mean_of_two_states(model_state, other_state, stride)
        loss, weight, gradient = across(jax.lax.psum, true, axis_name)

        def mean(g, p):
            return (g / weight.astype(g.dtype)).astype(p.dtype)

        beside = (aux, mean_over_shards(model_state, axis_name))
        return (loss / weight, *beside), jax.tree.map(mean, gradient, params), h

    return Sampler(OWNER, estimator, with_gradient)


def _check_loss_fn(loss_fn: Any, sampled_loss_fn: Any) -> None:
    if sampled_loss_fn is not None:
        raise ValueError(
            "a `sampled_loss_fn` makes a forward pass of its own, which nothing can share. Call "
            "`jax.value_and_grad` and let `update` take the sample, or pass `logits_fn` instead."
        )
    checks.given(
        "value_grad_and_hessian with gauss_newton_bartlett",
        "loss_fn",
        loss_fn,
        "Pass `loss_fn=lambda outputs, inputs: ...`, the true loss of each output of `logits_fn` "
        "(without `inputs`: `lambda outputs: ...`).",
    )
