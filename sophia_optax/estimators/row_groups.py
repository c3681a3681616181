"""Groups of consecutive rows: cut them out, evaluate them in rounds, put the rows in order again.

A round evaluates `parallel` groups at once under `jax.vmap`, one in each slot. If `parallel` does
not divide the number of groups, the last round has idle slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax.estimators.chunked_logits import LinearLogits
from sophia_optax.estimators.rows import (
    Rows,
    batch_size,
    check_groups,
    check_stride,
    every_nth_row,
    every_other_row,
    is_key,
    numbers_of,
    row_axes,
)
from sophia_optax.sharding import AxisName, Spec, Tree, spec_of, sum_over, with_auto_axes


def sampled_rows(batch: Rows, groups: int, fraction: float) -> Rows:
    """The rows that are sampled, with their row numbers in the full batch."""
    inputs, weights, row_numbers = batch
    if inputs is None:
        if groups > 1 or fraction != 1:
            raise ValueError(
                f"gauss_newton_bartlett(groups={groups}, batch_fraction={fraction}) cuts rows "
                "from `inputs`, which was not passed. Pass `inputs=batch` and "
                "`logits_fn=lambda params, inputs: ...`."
            )
        numbers = None if row_numbers is None else numbers_of(row_numbers, jnp.size(row_numbers))
        return Rows(None, weights, numbers)
    numbers = numbers_of(row_numbers, batch_size((inputs, weights)))
    rows = every_nth_row(Rows(inputs, weights, numbers), fraction)
    check_groups(len(rows.numbers), len(numbers), fraction, groups)
    return rows


def remaining_rows(batch: Rows, stride: int) -> Rows:
    """The rows that are not sampled."""
    inputs, weights, row_numbers = batch
    number = batch_size((inputs, weights))
    check_stride(number, stride)
    return every_other_row(Rows(inputs, weights, numbers_of(row_numbers, number)), stride)


# ---------------------------------------------------------------- joining the results of two passes


def mean_of_parts(sampled: Tree, remaining: Tree, groups: int, stride: int) -> Tree:
    """Mean over all rows, from sums over the sampled groups and means over the remaining rows."""
    share = 1 / stride
    return jax.tree.map(lambda s, m: s * (share / groups) + m * (1 - share), sampled, remaining)


def join_rows(sampled: Tree, remaining: Tree, number: int) -> Tree:
    """Auxiliary output in the order of the batch; `number` rows of it were sampled."""

    def join(x, other):
        parts = x.reshape(number, 1, *x.shape[1:]), other.reshape(number, -1, *x.shape[1:])
        return jnp.concatenate(parts, 1).reshape(-1, *x.shape[1:])

    def joined(x, other):
        return with_auto_axes(join, x, other, specs=spec_of(other))

    return jax.tree.map(joined, sampled, remaining)


def mean_of_states(states: Tree) -> Tree:
    """[G, ...] to [...]: the mean of real numbers over groups, and the first of everything else.

    Running averages all start from one state, so their mean is the average of the whole batch.
    """

    def mean(x):
        return x.mean(0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]

    return jax.tree.map(mean, states)


def mean_of_two_states(sampled: Tree, remaining: Tree, stride: int) -> Tree:
    """As `mean_of_states`, where one row in `stride` was sampled."""

    def mean(x, y):
        return x / stride + y * (1 - 1 / stride) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(mean, sampled, remaining)


# ---------------------------------------------------------------- rounds of parallel groups


def in_parallel_groups(logits_fn: Any, number: int, spmd_axis_name: AxisName) -> Callable:
    """`logits_fn` on `number` equal groups of the rows at once, spread over mesh axes.

    Sharding constraints inside `logits_fn` then apply to one group, as they do in a sample.
    """

    def parts(params, inputs):
        outputs = logits_fn(params, inputs)
        if not isinstance(outputs, LinearLogits):
            return outputs, None
        return outputs.features, dataclasses.replace(outputs, features=None)

    # All groups share what has no rows, such as the matrix of a head.
    mapped = jax.vmap(parts, (None, 0), (0, None), spmd_axis_name=spmd_axis_name)

    def outputs_of(params, inputs):
        rows = batch_size(inputs)
        if rows % number:
            raise ValueError(
                f"parallel_groups={number} does not divide the {rows} rows of `inputs` whose "
                "gradient is taken. Choose the number of devices that the batch is spread over."
            )
        cut = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), inputs)
        by_row, whole = mapped(params, cut)
        by_row = by_row.reshape(-1, *by_row.shape[2:])
        return by_row if whole is None else dataclasses.replace(whole, features=by_row)

    return outputs_of


def zero_unless(condition: jax.Array | None, tree: Tree) -> Tree:
    """Zeros where the condition is false; None counts as true."""
    if condition is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(condition, x, 0), tree)


def sum_over_groups(
    function: Callable[[Tree, jax.Array | None], tuple[Tree, tuple[Tree, Tree]]],
    rows: Tree,
    groups: int,
    parallel: int,
    axis_name: AxisName,
) -> tuple[Tree, tuple[Tree, Tree]]:
    """Evaluates all groups in rounds: (sums, (auxiliary output in the order of the rows, state)).

    Args:
      function: `(rows, counts) -> (sums, (auxiliary output, state))` of one group, or of
        `parallel` groups if that is more than one. `counts` is False in an idle slot, and None if
        no slot is idle. With idle slots there must be no auxiliary output.
      rows: all rows that are sampled.
      groups: number of groups.
      parallel: number of groups in a round.
      axis_name: manual axes over which the sums differ.
    """
    if groups == parallel == 1:
        return function(rows, None)
    # The scan is outside the vmap: inside, its sums would be as large as all parameters on every
    # device, however these are sharded. A scan over groups instead of rounds would gather every
    # group onto every device.
    cuts = _cut_into_rounds(rows, groups, parallel)
    sums, (aux, states) = sum_over(lambda cuts: function(*cuts), cuts, axis_name)
    if parallel > 1:
        states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
    return sums, (jax.tree.map(lambda x: _join_rounds(x, parallel), aux), mean_of_states(states))


def _cut_into_rounds(rows: Tree, groups: int, parallel: int) -> tuple[Tree, jax.Array | None]:
    """(leaves [rounds, parallel, rows of a group, ...], bool[rounds, parallel] or None).

    The second axis is missing if `parallel` is 1. The booleans say which slots are not idle.
    """
    rounds, idle = -(-groups // parallel), groups % parallel > 0
    lead = row_axes(rows)

    def cut(rows):
        slots = jnp.arange(rounds * parallel).reshape(parallel, rounds).T
        counts = slots < groups if idle else None
        return jax.tree.map(lambda x: _cut_leaf(x, groups, parallel, rounds), rows), counts

    specs = jax.tree.map(lambda x: _spec_in_rounds(x, lead, parallel), rows)
    return with_auto_axes(cut, rows, specs=(specs, Spec((None, lead)) if idle else None))


def _cut_leaf(x: jax.Array, groups: int, parallel: int, rounds: int) -> jax.Array:
    if is_key(x):
        keys = jax.random.split(x, rounds * parallel)
        return keys.reshape(rounds, parallel) if parallel > 1 else keys
    x = _wrap(x.reshape(groups, -1, *x.shape[1:]), parallel)
    x = x.reshape(parallel, rounds, *x.shape[1:]).swapaxes(0, 1)
    return x if parallel > 1 else x[:, 0]


def _spec_in_rounds(x: jax.Array, lead: Any, parallel: int) -> Spec:
    """Explicit mesh axes of a leaf that `_cut_leaf` has cut."""
    if is_key(x):
        return Spec((None, lead)) if parallel > 1 else Spec()
    rest = spec_of(x)[1:]
    return Spec((None, lead, None, *rest) if parallel > 1 else (None, lead, *rest))


def _wrap(x: jax.Array, multiple: int) -> jax.Array:
    """Repeats leading entries at the end of `x`, so that `multiple` divides their number."""
    missing = -len(x) % multiple
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), "wrap") if missing else x


def _join_rounds(x: jax.Array, parallel: int) -> jax.Array:
    """[rounds, parallel, rows of a group, ...] to [rows, ...], in the order of the rows."""

    def join(x):
        x = x if parallel > 1 else x[:, None]
        return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])

    _, first, *rest = spec_of(x)
    spec = (first or rest[0], *rest[1:]) if parallel > 1 else (first, *rest)
    return with_auto_axes(join, x, specs=Spec(spec))


def check_aux_rows(aux: Tree, number: int, groups: int, fraction: float) -> None:
    """Rejects auxiliary output that does not lead with the rows of its outputs."""
    if any(jnp.shape(x)[:1] != (number,) for x in jax.tree.leaves(aux)):
        raise ValueError(
            f"with groups={groups} and batch_fraction={fraction} the auxiliary output of `loss_fn` "
            f"must lead with the rows of its outputs, here {number}, but its shapes are "
            f"{jax.tree.map(jnp.shape, aux)}. The passes over groups can only be joined row by row."
        )
