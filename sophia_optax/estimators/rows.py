"""Rows of a batch: their number, their row numbers, and which of them are sampled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sophia_optax.sharding import Spec, Tree, spec_of, with_auto_axes


class Rows(NamedTuple):
    """Rows of a batch. Every leaf but a PRNG key of shape () leads with the row axis."""

    inputs: Tree
    weights: Any
    numbers: Any  # int32[B], or None for 0, 1, ...


def is_key(x: Any) -> bool:
    """Whether a leaf of `inputs` is a PRNG key of shape (), which belongs to no row."""
    return jnp.shape(x) == () and jnp.issubdtype(jax.typeof(x).dtype, jax.dtypes.prng_key)


def map_rows(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Applies `function` to each leaf that has rows; keys stay as they are."""
    return jax.tree.map(lambda x: x if is_key(x) else function(x), tree)


def batch_size(inputs: Tree) -> int:
    """The number of rows, which all leaves but keys must share."""
    leaves = [x for x in jax.tree.leaves(inputs) if not is_key(x)]
    sizes = {jnp.shape(x)[0] for x in leaves if jnp.ndim(x)}
    if len(sizes) != 1 or not all(map(jnp.ndim, leaves)):
        raise ValueError(
            "every leaf of `inputs` (and `weights`) must lead with the same batch axis, but the "
            f"shapes are {[jnp.shape(x) for x in leaves]}. A random key may be a leaf if it is "
            "typed (`jax.random.key`), or you may split it into one key per row. Close over "
            "everything else that has no rows."
        )
    return sizes.pop()


def numbers_of(row_numbers: Any, rows: int) -> jax.Array:
    """int32[B]: the row numbers that the caller passed, or 0, 1, ..."""
    if row_numbers is None:
        return jnp.arange(rows)
    if jnp.shape(row_numbers) != (rows,) or not jnp.issubdtype(
        jnp.result_type(row_numbers), jnp.integer
    ):
        raise ValueError(
            f"`row_numbers` must be int32[{rows}], a number for each row of `inputs`, but it is "
            f"{jnp.result_type(row_numbers)}{list(jnp.shape(row_numbers))}."
        )
    return jnp.asarray(row_numbers)


def every_nth_row(tree: Tree, fraction: float) -> Tree:
    """Takes every n-th row, n = round(1 / fraction), so each shard of the batch keeps its share.

    A slice `x[:n]` would move rows between devices.
    """
    stride = round(1 / fraction)
    if stride == 1:
        return tree
    return map_rows(lambda x: with_auto_axes(lambda x: x[::stride], x, specs=spec_of(x)), tree)


def every_other_row(tree: Tree, stride: int) -> Tree:
    """Takes the rows that `every_nth_row` leaves out."""

    def rest(x):
        return x.reshape(-1, stride, *x.shape[1:])[:, 1:].reshape(-1, *x.shape[1:])

    return map_rows(lambda x: with_auto_axes(rest, x, specs=spec_of(x)), tree)


def split_interleaved(tree: Tree, number: int) -> Tree:
    """[B, ...] to [K, B / K, ...]: part i has the rows i, i + K, ..., and a PRNG key of its own.

    Each shard of the batch then holds its share of every part, and no row moves.
    """

    def cut(x):
        return x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1)

    def parts(x):
        if is_key(x):
            return jax.random.split(x, number)
        return with_auto_axes(cut, x, specs=Spec((None, *spec_of(x))))

    return jax.tree.map(parts, tree)


def row_axes(tree: Tree) -> Any:
    """Explicit mesh axes over which the rows are sharded, or None."""
    specs = [spec_of(x) for x in jax.tree.leaves(tree) if jnp.ndim(x)]
    return next((spec[0] for spec in specs if spec[0] is not None), None)


# ---------------------------------------------------------------- checks


def check_fraction(fraction: float) -> None:
    """Rejects a fraction of the rows that is not 1/n."""
    if not 0 < fraction <= 1:
        raise ValueError(f"batch_fraction={fraction} is outside (0, 1].")
    if abs(fraction * round(1 / fraction) - 1) > 1e-2:
        raise ValueError(
            f"batch_fraction={fraction} is not one n-th (1, 1/2, 1/3, ...), but every n-th row is "
            "sampled."
        )


def check_groups(rows: int, batch: int, fraction: float, groups: int) -> None:
    """Rejects a number of groups that does not divide the rows."""
    if rows % groups:
        raise ValueError(
            f"{rows} rows (of {batch}, batch_fraction={fraction}) do not divide into "
            f"groups={groups}. Choose a number of groups that divides the rows."
        )


def check_stride(number: int, stride: int) -> None:
    """Rejects a stride that does not divide the rows."""
    if number % stride:
        raise ValueError(
            f"batch_fraction=1/{stride} does not divide the {number} rows of `inputs`, which "
            "value_grad_and_hessian needs to put the rows in order again. Choose a fraction that "
            "divides them, or call `jax.value_and_grad` and let `update` take the sample."
        )
