"""Rows of a batch in groups: cut out, evaluated side by side or in turn, put in order again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax.estimators.chunked_logits import LinearLogits
from sophia_optax.estimators.rows import (
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


def sampled_rows(
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


def other_rows(inputs: Tree, weights: Any, row_numbers: Any, stride: int) -> tuple[Tree, Any, Any]:
    """(inputs, weights, row numbers) of the rows that are not in the sub-batch."""
    number = batch_size((inputs, weights))
    check_stride(number, stride)
    return every_other_row((inputs, weights, numbers_of(row_numbers, number)), stride)


def mean_of_parts(true: Tree, others: Tree, groups: int, stride: int) -> Tree:
    """Means over all rows, of sums over the groups and of means over the other rows."""
    share = 1 / stride
    return jax.tree.map(lambda s, m: s * (share / groups) + m * (1 - share), true, others)


def join_rows(aux: Tree, others: Tree, number: int) -> Tree:
    """Auxiliary output in the order of the rows, the sub-batch's `number` and the other rows'."""

    def join(x, other):
        parts = x.reshape(number, 1, *x.shape[1:]), other.reshape(number, -1, *x.shape[1:])
        return jnp.concatenate(parts, 1).reshape(-1, *x.shape[1:])

    def joined(x, other):
        return with_auto_axes(join, x, other, specs=spec_of(other))

    return jax.tree.map(joined, aux, others)


def mean_of_states(states: Tree) -> Tree:
    """[G, ...] to [...]: the mean of real numbers over groups, of anything else the first.

    Running averages all start from one state, so their mean is the average of the whole batch.
    """

    def mean(x):
        return x.mean(0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]

    return jax.tree.map(mean, states)


def mean_of_two_states(state: Tree, other: Tree, stride: int) -> Tree:
    """Of the sub-batch, one row in `stride`, and of the other rows."""

    def mean(x, y):
        return x / stride + y * (1 - 1 / stride) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(mean, state, other)


def spread(logits_fn: Any, shards: int, spmd_axis_name: AxisName) -> Callable:
    """`logits_fn` whose constraints apply to the rows of one shard, as in a group.

    It raises ValueError where shards do not divide the rows.
    """

    def spreading(params, inputs):
        number = batch_size(inputs)
        if number % shards:
            raise ValueError(
                f"shards={shards} does not divide the {number} rows of `inputs` whose gradient is "
                "taken. Choose the number of devices that the batch is spread over."
            )
        cut = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), inputs)
        # What has no rows, such as a head's matrix, is one for all shards.
        mapped = jax.vmap(parts, (None, 0), (0, None), spmd_axis_name=spmd_axis_name)
        of_rows, whole = mapped(params, cut)
        of_rows = of_rows.reshape(-1, *of_rows.shape[2:])
        return of_rows if whole is None else dataclasses.replace(whole, features=of_rows)

    def parts(params, inputs):
        outputs = logits_fn(params, inputs)
        if not isinstance(outputs, LinearLogits):
            return outputs, None
        return outputs.features, dataclasses.replace(outputs, features=None)

    return spreading


def _filled(x: jax.Array, multiple: int) -> jax.Array:
    """`x` with leading entries repeated at its end, up to a multiple of their number."""
    missing = -len(x) % multiple
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), "wrap") if missing else x


def zero_unless(condition: jax.Array | None, tree: Tree) -> Tree:
    """Zeros where the condition is false; None is always true."""
    if condition is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(condition, x, 0), tree)


def sum_over_groups(
    function: Callable[[Tree, jax.Array | None], tuple[Tree, tuple[Tree, Tree]]],
    rows: Tree,
    groups: int,
    shards: int,
    axis_name: AxisName,
) -> tuple[Tree, tuple[Tree, Tree]]:
    """(sums, (outputs by row, state)); `function` takes rows of one group, or of `shards` of them.

    Groups that only fill the last round are told that they do not count, and must give no output
    by row. The scan is outside: inside a shard its sums would be of the size of all parameters,
    however these are sharded. A scan over all groups would gather every group onto every device.
    """
    if groups == shards == 1:
        return function(rows, None)
    cuts = _rounds(rows, groups, shards)
    sums, (aux, states) = sum_over(lambda cuts: function(*cuts), cuts, axis_name)
    if shards > 1:
        states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
    return sums, (jax.tree.map(lambda x: _joined(x, shards), aux), mean_of_states(states))


def _rounds(rows: Tree, groups: int, shards: int) -> tuple[Tree, jax.Array | None]:
    """([rounds, shards, rows of a group, ...] or without the second axis, which places count)."""
    rounds = -(-groups // shards)
    places = jnp.arange(rounds * shards).reshape(shards, rounds).T

    def cut(x):
        x = _filled(x.reshape(groups, -1, *x.shape[1:]), shards)
        x = x.reshape(shards, rounds, *x.shape[1:]).swapaxes(0, 1)
        return x if shards > 1 else x[:, 0]

    def key(x):
        keys = jax.random.split(x, rounds * shards)
        return keys.reshape(rounds, shards) if shards > 1 else keys

    lead = row_axes(rows)

    def spec(x):
        if is_key(x):
            return Spec((None, lead)) if shards > 1 else Spec()
        rest = spec_of(x)[1:]
        return Spec((None, lead, None, *rest) if shards > 1 else (None, lead, *rest))

    def all_cut(rows):
        counts = places < groups if groups % shards else None
        return jax.tree.map(lambda x: key(x) if is_key(x) else cut(x), rows), counts

    counts = Spec((None, lead)) if groups % shards else None
    return with_auto_axes(all_cut, rows, specs=(jax.tree.map(spec, rows), counts))


def _joined(x: jax.Array, shards: int) -> jax.Array:
    """What `_rounds` cut, by rows again."""

    def join(x):
        x = x if shards > 1 else x[:, None]
        return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])

    _, first, *rest = spec_of(x)
    spec = (first or rest[0], *rest[1:]) if shards > 1 else (first, *rest)
    return with_auto_axes(join, x, specs=Spec(spec))


def check_leads_with_rows(aux: Tree, number: int, groups: int, fraction: float) -> None:
    """Raises ValueError where an output is not by row."""
    if any(jnp.shape(x)[:1] != (number,) for x in jax.tree.leaves(aux)):
        raise ValueError(
            f"with groups={groups} and batch_fraction={fraction} the auxiliary output of `loss_fn` "
            f"must lead with the rows of its outputs, here {number}, but its shapes are "
            f"{jax.tree.map(jnp.shape, aux)}: what is not of a row cannot be joined."
        )
