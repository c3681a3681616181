"""Rows of a batch: how many there are, what their numbers are, and which of them are sampled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax.sharding import Spec, Tree, spec_of, with_auto_axes


def is_key(x: Any) -> bool:
    """A PRNG key in `inputs`, which belongs to no row."""
    return jnp.shape(x) == () and jnp.issubdtype(jax.typeof(x).dtype, jax.dtypes.prng_key)


def map_rows(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """`function` of each leaf that has rows; keys stay."""
    return jax.tree.map(lambda x: x if is_key(x) else function(x), tree)


def batch_size(inputs: Tree) -> int:
    """The number of rows, the same in every leaf but keys."""
    leaves = [x for x in jax.tree.leaves(inputs) if not is_key(x)]
    sizes = {jnp.shape(x)[0] for x in leaves if jnp.ndim(x)}
    if len(sizes) != 1 or not all(map(jnp.ndim, leaves)):
        raise ValueError(
            "every leaf of `inputs` (and `weights`) must lead with the same batch axis, but the "
            f"shapes are {[jnp.shape(x) for x in leaves]}. A random key may be a leaf if it is "
            "typed (`jax.random.key`), or be split into one for each row; close over what else has "
            "no rows."
        )
    return sizes.pop()


def numbers_of(row_numbers: Any, rows: int) -> jax.Array:
    """int32[B]: the numbers that were passed, or 0, 1, ..."""
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
    """Every (1/fraction)-th row, so that each shard of the batch keeps its share.

    A slice `x[:n]` would move rows between devices.
    """
    stride = round(1 / fraction)
    if stride == 1:
        return tree
    return map_rows(lambda x: with_auto_axes(lambda x: x[::stride], x, specs=spec_of(x)), tree)


def every_other_row(tree: Tree, stride: int) -> Tree:
    """The rows that `every_nth_row` leaves."""

    def rest(x):
        return x.reshape(-1, stride, *x.shape[1:])[:, 1:].reshape(-1, *x.shape[1:])

    return map_rows(lambda x: with_auto_axes(rest, x, specs=spec_of(x)), tree)


def in_sets(tree: Tree, number: int) -> Tree:
    """[B, ...] to [sets, B / sets, ...]: set g has the rows g, g + sets, ... and its own key."""

    def cut(x):
        return x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1)

    def sets(x):
        if is_key(x):
            return jax.random.split(x, number)
        return with_auto_axes(cut, x, specs=Spec((None, *spec_of(x))))

    return jax.tree.map(sets, tree)


def row_axes(tree: Tree) -> Any:
    """Explicit mesh axes over which the rows are sharded, or None."""
    specs = [spec_of(x) for x in jax.tree.leaves(tree) if jnp.ndim(x)]
    return next((spec[0] for spec in specs if spec[0] is not None), None)


# ---------------------------------------------------------------- refusals


def check_fraction(fraction: float) -> None:
    """Refuses a share of the rows that is not one n-th."""
    if not 0 < fraction <= 1:
        raise ValueError(f"batch_fraction={fraction} is outside (0, 1].")
    if abs(fraction * round(1 / fraction) - 1) > 1e-2:
        raise ValueError(
            f"batch_fraction={fraction} is not one n-th (1, 1/2, 1/3, ...): each n-th row is taken."
        )


def check_groups(rows: int, batch: int, fraction: float, groups: int) -> None:
    """Refuses groups that do not divide the rows."""
    if rows % groups:
        raise ValueError(
            f"{rows} rows (of {batch}, batch_fraction={fraction}) do not divide into "
            f"groups={groups}. Choose a number of groups that divides the rows."
        )


def check_stride(number: int, stride: int) -> None:
    """Refuses a stride that does not divide the rows."""
    if number % stride:
        raise ValueError(
            f"batch_fraction=1/{stride} does not divide the {number} rows of `inputs`, which "
            "value_grad_and_hessian needs to put the rows in order again. Choose a fraction that "
            "divides them, or call `jax.value_and_grad` and let `update` take the sample."
        )
