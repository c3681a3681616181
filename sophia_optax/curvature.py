"""Estimators: one sample of the diagonal of the curvature.

An estimator is a pure function `(key, params, updates, **extra) -> h`; h is shaped as params,
float32 at least, in units of loss / parameter². `hessian_estimate` decides when to take samples
and how to average them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks

Tree = Any
AxisName = str | tuple[str, ...] | None


class Estimator(Protocol):
    """What `hessian_estimate` calls: one sample of diag H.

    Args:
      key: a typed PRNG key, another one for each sample.
      params: the parameters.
      updates: the incoming gradient, shaped as params.
      **extra: the extra arguments of `update`, and `axis_name`; unknown ones are ignored.

    Returns:
      One sample, shaped as params, float32 at least.

    >>> import jax, jax.numpy as jnp
    >>> def absolute(key, params, updates, **unused):
    ...     return jax.tree.map(jnp.abs, updates)
    >>> print(absolute(jax.random.key(0), None, jnp.array([1., -2.])))
    [1. 2.]
    """

    def __call__(
        self, key: jax.Array, params: optax.Params | None, updates: optax.Updates, **extra: Any
    ) -> optax.Updates: ...


@dataclasses.dataclass(frozen=True)
class SharingEstimator:
    """An estimator that can also give the loss and its gradient: see `value_grad_and_hessian`."""

    sample: Estimator
    with_gradient: Callable[..., tuple[tuple[jax.Array, Tree], Tree, Tree]]
    """`(key, params, *, has_aux, **extra) -> ((loss, aux), gradient, h)`."""

    def __call__(
        self, key: jax.Array, params: optax.Params | None, updates: optax.Updates, **extra: Any
    ) -> optax.Updates:
        return self.sample(key, params, updates, **extra)


def accumulation_dtype(x: jax.typing.ArrayLike) -> jnp.dtype:
    """float32 at least, float64 where `x` is."""
    with jax.numpy_dtype_promotion("standard"):  # else bfloat16 has no answer in strict mode
        return jnp.promote_types(jnp.result_type(x), jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    return x.astype(accumulation_dtype(x))


def mean_over_samples(
    sample: Callable[[jax.Array], Tree],
    key: jax.Array,
    num_samples: int,
    axis_name: AxisName = None,
) -> Tree:
    """The mean of `sample` at `num_samples` keys; one key is used as it is."""
    if num_samples == 1:
        return sample(key)
    keys = jax.random.split(key, num_samples)
    total, _ = sum_over(lambda key: (sample(key), None), keys, axis_name)
    return jax.tree.map(lambda s: s / num_samples, total)


def sum_over(
    function: Callable[[Any], tuple[Tree, Tree]], xs: Any, axis_name: AxisName = None
) -> tuple[Tree, Tree]:
    """(sum of the first results, all second results) over the rows of `xs`, one by one."""
    shapes, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], xs))
    zeros = varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), axis_name)

    def add(total, x):
        part, kept = function(x)
        return optax.tree.add(total, part), kept

    return jax.lax.scan(add, zeros, xs)


def batch_size(inputs: Tree) -> int:
    """The number of rows, the same in every leaf."""
    leaves = jax.tree.leaves(inputs)
    sizes = {jnp.shape(x)[0] for x in leaves if jnp.ndim(x)}
    if len(sizes) != 1 or not all(map(jnp.ndim, leaves)):
        raise ValueError(
            "every leaf of `inputs` (and `weights`) must lead with the same batch axis, but the "
            f"shapes are {[jnp.shape(x) for x in leaves]}."
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
    return jax.tree.map(lambda x: x[::stride], tree) if stride > 1 else tree


def check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"batch_fraction={fraction} is outside (0, 1].")
    if abs(fraction * round(1 / fraction) - 1) > 1e-2:
        raise ValueError(
            f"batch_fraction={fraction} is not one n-th (1, 1/2, 1/3, ...): each n-th row is taken."
        )


def check_groups(rows: int, batch: int, fraction: float, groups: int) -> None:
    if rows % groups:
        raise ValueError(
            f"{rows} rows (of {batch}, batch_fraction={fraction}) do not divide into "
            f"groups={groups}. Choose a number of groups that divides the rows."
        )


def check_params(owner: str, params: optax.Params) -> None:
    _checks.given(owner, "params", params, "Call `tx.update(grads, state, params, ...)`.")
    _checks.unmasked(owner, params)


def across(collective: Callable, tree: Tree, axis_name: AxisName) -> Tree:
    """A `psum` or `pmean` inside `shard_map`, nothing outside."""
    return tree if axis_name is None else collective(tree, axis_name)


def varying(tree: Tree, axis_name: AxisName) -> Tree:
    """Marks a tree as differing over shards: else `grad` inside `shard_map` sums over them."""
    if axis_name is None:
        return tree
    zero = 0 * jax.lax.axis_index(axis_name)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)
