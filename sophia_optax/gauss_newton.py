"""Gauss-Newton-Bartlett: the Gauss-Newton diagonal from labels that the model draws itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax import _checks
from sophia_optax.curvature import (
    AxisName,
    Estimator,
    SharingEstimator,
    Tree,
    across,
    batch_size,
    check_fraction,
    check_groups,
    check_params,
    every_nth_row,
    mean_over_samples,
    numbers_of,
    sum_over,
    varying,
    widen,
)
from sophia_optax.likelihood import SAMPLED_LOSSES, gradient_pass, logits_pass, user_pass
from sophia_optax.linear import LinearLogits

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
) -> Estimator:
    r"""Gauss-Newton-Bartlett estimator of the diagonal of the Gauss-Newton matrix.

        h = (1/B) Σ_m s_m ⊙ s_m,    B = Σ w

    Labels are drawn from the model's own predictions; s_m is the gradient of the summed loss of
    group m on them, each output's cotangent times sqrt(w). One group is the paper's B ĝ ⊙ ĝ,
    whose relative variance is about 2 whatever the batch. More groups cost the same number of
    floating-point operations, stay unbiased, and divide the variance by up to their number.

    Args:
      likelihood: "categorical" (softmax over the last axis, which B does not count), "bernoulli"
        (element-wise sigmoid, B counts elements), or "gaussian" (½ Σ (y-f)² over the last axis,
        unit variance, B counts the leading elements).
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
        `shards / devices` gradients of one layer. Inside `shard_map` it has no effect.
      spmd_axis_name: as in `jax.vmap`: mesh axes over which the groups side by side are spread,
        those of the batch. Sharding constraints inside `logits_fn` apply to the rows of one group
        then, which lie on one device: they name no such axis (`PartitionSpec()` keeps activations
        where their rows are).

    Extra arguments of `update`:
      logits_fn: `params -> float[B, ..., V]`, or `(params, inputs)` when `inputs` is passed; of
        "categorical" it may return `LinearLogits`, which are never held whole.
      sampled_loss_fn: instead of `logits_fn`, `(params, inputs, key) -> (summed loss on labels
        drawn from the model, number of counted outputs)`, for losses that never hold all logits;
        it weighs its own outputs, each cotangent times sqrt(w).
      inputs: pytree whose leaves lead with the batch axis.
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
      rejects it. On a mesh with explicit axes, wrap the call in `jax.sharding.auto_axes`.

    Raises:
      ValueError: an argument is out of range; neither function is passed; `groups` or
        `batch_fraction` without `inputs`; rows that do not divide into groups; `weights` or
        `row_numbers` of a wrong shape; params are masked.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 2, extended to groups and weights.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[1.], [2.], [3.], [4.]])
    >>> logits_fn = lambda params, x: x * params                 # Bernoulli: diag = mean p(1-p)x²
    >>> gnb = gauss_newton_bartlett(likelihood="bernoulli", groups=4, num_samples=4000)
    >>> h = gnb(jax.random.key(0), jnp.zeros(1), None, logits_fn=logits_fn, inputs=x)
    >>> print(jnp.round(h, 1))                                   # 0.25 * (1 + 4 + 9 + 16) / 4
    [1.9]
    """
    _checks.one_of("likelihood", likelihood, tuple(SAMPLED_LOSSES))
    for name, value in (("groups", groups), ("num_samples", num_samples), ("shards", shards)):
        _checks.positive_integer(name, value)
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
            _leads_with_rows(aux, batch_size(rows), groups, batch_fraction)

    def differentiate(key, params, forward, rows, axis_name):
        """(sums over groups of `Pass.true`, auxiliary output, h)."""
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        side_by_side = shards if axis_name is None else 1
        beside = SIDE_BY_SIDE if side_by_side > 1 else None

        def group(rows, counts):
            draw, true, aux = forward(params, rows)
            check_aux(aux, rows)

            def add_up(tree):
                return across(jax.lax.psum, _where(counts, tree), beside)

            def square(key):
                s, count = draw(key)
                return add_up((jax.tree.map(lambda s: jnp.square(widen(s)), s), count))

            return (add_up(true), mean_over_samples(square, key, num_samples, axis_name)), aux

        if side_by_side > 1:
            group = jax.vmap(
                group, out_axes=(None, 0), axis_name=beside, spmd_axis_name=spmd_axis_name
            )
        (true, squared), aux = _sum_over_groups(group, rows, groups, side_by_side, axis_name)
        squares, count = across(jax.lax.psum, squared, axis_name)
        return true, aux, jax.tree.map(lambda s: s / count.astype(s.dtype), squares)

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
        if sampled_loss_fn is None:
            forward = logits_pass(likelihood, logits_fn)
        else:
            forward = user_pass(sampled_loss_fn, weights)
        rows = _rows(inputs, weights, row_numbers, groups, batch_fraction)
        return differentiate(key, varying(params, axis_name), forward, rows, axis_name)[2]

    def with_gradient(
        key,
        params,
        *,
        has_aux,
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
        forward = logits_pass(likelihood, logits_fn, loss_fn, has_aux)
        rows = _rows(inputs, weights, row_numbers, groups, batch_fraction)
        here = varying(params, axis_name)
        over_all = logits_fn
        if spmd_axis_name is not None and axis_name is None:
            over_all = _spread(logits_fn, shards, spmd_axis_name)
        plain = gradient_pass(likelihood, over_all, loss_fn, has_aux)
        if groups % shards and axis_name is None:
            # Beside idle places a shared pass saves no time, and moves the rows that it leaves.
            true, aux = plain(here, (inputs, weights, row_numbers))
            sampled = logits_pass(likelihood, logits_fn)
            h = differentiate(key, here, sampled, rows, axis_name)[2]
        else:
            true, aux, h = differentiate(key, here, forward, rows, axis_name)
            if stride > 1:
                rest = _other_rows(inputs, weights, row_numbers, stride)
                others, other_aux = plain(here, rest)
                check_aux(other_aux, rest)
                true = _mean_of_parts(true, others, groups, stride)
                aux = _join(aux, other_aux, batch_size(rows))
        loss, weight, gradient = across(jax.lax.psum, true, axis_name)

        def mean(g, p):
            return (g / weight.astype(g.dtype)).astype(p.dtype)

        return (loss / weight, aux), jax.tree.map(mean, gradient, params), h

    return SharingEstimator(estimator, with_gradient)


def _check_loss_fn(loss_fn: Any, sampled_loss_fn: Any) -> None:
    if sampled_loss_fn is not None:
        raise ValueError(
            "a `sampled_loss_fn` makes a forward pass of its own, which nothing can share. Call "
            "`jax.value_and_grad` and let `update` take the sample, or pass `logits_fn` instead."
        )
    _checks.given(
        "value_grad_and_hessian with gauss_newton_bartlett",
        "loss_fn",
        loss_fn,
        "Pass `loss_fn=lambda outputs, inputs: ...`, the true loss of each output of `logits_fn` "
        "(without `inputs`: `lambda outputs: ...`).",
    )


def _rows(
    inputs: Tree, weights: Any, row_numbers: Any, groups: int, fraction: float
) -> tuple[Tree, Any, Any]:
    """(inputs, weights, row numbers) of the sub-batch; row numbers are those of the full batch."""
    if inputs is None:
        if groups > 1 or fraction != 1:
            raise ValueError(
                f"gauss_newton_bartlett(groups={groups}, batch_fraction={fraction}) cuts rows "
                "from `inputs`, which was not passed. Pass `inputs=batch` and "
                "`logits_fn=lambda params, inputs: ...`."
            )
        numbers = None if row_numbers is None else numbers_of(row_numbers, jnp.size(row_numbers))
        return None, weights, numbers
    numbers = numbers_of(row_numbers, batch_size((inputs, weights)))
    rows = every_nth_row((inputs, weights, numbers), fraction)
    check_groups(len(rows[2]), len(numbers), fraction, groups)
    return rows


def _other_rows(inputs: Tree, weights: Any, row_numbers: Any, stride: int) -> tuple[Tree, Any, Any]:
    """(inputs, weights, row numbers) of the rows that are not in the sub-batch."""
    number = batch_size((inputs, weights))
    if number % stride:
        raise ValueError(
            f"batch_fraction=1/{stride} does not divide the {number} rows of `inputs`, which "
            "value_grad_and_hessian needs to put the rows in order again. Choose a fraction that "
            "divides them, or call `jax.value_and_grad` and let `update` take the sample."
        )
    return jax.tree.map(
        lambda x: x.reshape(-1, stride, *x.shape[1:])[:, 1:].reshape(-1, *x.shape[1:]),
        (inputs, weights, numbers_of(row_numbers, number)),
    )


def _mean_of_parts(true: Tree, others: Tree, groups: int, stride: int) -> Tree:
    """Means over all rows, of sums over the groups and of means over the other rows."""
    share = 1 / stride
    return jax.tree.map(lambda s, m: s * (share / groups) + m * (1 - share), true, others)


def _join(aux: Tree, others: Tree, number: int) -> Tree:
    """Auxiliary output in the order of the rows, the sub-batch's `number` and the other rows'."""

    def join(x, other):
        parts = x.reshape(number, 1, *x.shape[1:]), other.reshape(number, -1, *x.shape[1:])
        return jnp.concatenate(parts, 1).reshape(-1, *x.shape[1:])

    return jax.tree.map(join, aux, others)


def _spread(logits_fn: Any, shards: int, spmd_axis_name: AxisName) -> Callable:
    """`logits_fn` whose constraints apply to the rows of one shard, as in a group."""

    def spread(params, inputs):
        number = batch_size(inputs)
        cut = jax.tree.map(lambda x: _filled(x, shards).reshape(shards, -1, *x.shape[1:]), inputs)
        # What has no rows, such as a head's matrix, is one for all shards.
        mapped = jax.vmap(parts, (None, 0), (0, None), spmd_axis_name=spmd_axis_name)
        of_rows, whole = mapped(params, cut)
        of_rows = of_rows.reshape(-1, *of_rows.shape[2:])[:number]
        return of_rows if whole is None else dataclasses.replace(whole, features=of_rows)

    def parts(params, inputs):
        outputs = logits_fn(params, inputs)
        if not isinstance(outputs, LinearLogits):
            return outputs, None
        return outputs.features, dataclasses.replace(outputs, features=None)

    return spread


def _filled(x: jax.Array, multiple: int) -> jax.Array:
    """`x` with leading entries repeated at its end, up to a multiple of their number."""
    missing = -len(x) % multiple
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), "wrap") if missing else x


def _where(condition: jax.Array | None, tree: Tree) -> Tree:
    """Zeros where the condition is false; None is always true."""
    if condition is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(condition, x, 0), tree)


def _sum_over_groups(
    function: Callable[[Tree, jax.Array | None], tuple[Tree, Tree]],
    rows: Tree,
    groups: int,
    shards: int,
    axis_name: AxisName,
) -> tuple[Tree, Tree]:
    """(sums, outputs by row); `function` takes the rows of a group, or of `shards` of them.

    Groups that only fill the last round are told that they do not count. The scan is outside:
    inside a shard its sums would be of the size of all parameters, however these are sharded. A
    scan over all groups would gather every group onto every device.
    """
    if groups == shards == 1:
        return function(rows, None)
    number, rounds = batch_size(rows), -(-groups // shards)
    places = jnp.arange(rounds * shards).reshape(shards, rounds).T

    def cut(x):
        x = _filled(x.reshape(groups, -1, *x.shape[1:]), shards)
        x = x.reshape(shards, rounds, *x.shape[1:]).swapaxes(0, 1)
        return x if shards > 1 else x[:, 0]

    def join(x):
        x = x if shards > 1 else x[:, None]
        return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])[:number]

    cuts = jax.tree.map(cut, rows), places < groups if groups % shards else None
    sums, aux = sum_over(lambda cuts: function(*cuts), cuts, axis_name)
    return sums, jax.tree.map(join, aux)


def _leads_with_rows(aux: Tree, number: int, groups: int, fraction: float) -> None:
    if any(jnp.shape(x)[:1] != (number,) for x in jax.tree.leaves(aux)):
        raise ValueError(
            f"with groups={groups} and batch_fraction={fraction} the auxiliary output of `loss_fn` "
            f"must lead with the rows of its outputs, here {number}, but its shapes are "
            f"{jax.tree.map(jnp.shape, aux)}: what is not of a row cannot be joined."
        )
