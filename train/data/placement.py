"""Places the rows of a batch on the devices of a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def to_mesh(make_rows: Callable[[slice], Any], shapes: Any) -> Any:
    """A tree of global arrays; each process makes only the rows that its own devices hold, once.

    Args:
        make_rows: slice of the leading axis -> tree of NumPy arrays [rows, ...], for example
            `lambda rows: data.batch(step, rows)`.
        shapes: the same tree of `jax.ShapeDtypeStruct`s with global shapes and any shardings.

    Returns:
        The tree of global arrays.
    """
    leaves, structure = jax.tree.flatten(shapes)
    # Devices along other mesh axes hold the same rows, and JAX calls once for each device.
    made = functools.cache(
        lambda start, stop: structure.flatten_up_to(make_rows(slice(start, stop)))
    )
    arrays = [_array(made, number, like) for number, like in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


def _array(made: Callable[[int, int], Any], number: int, like: Any) -> jax.Array:
    def shard(index: Any) -> Any:
        rows, *rest = index
        start, stop, _ = rows.indices(like.shape[0])
        return made(start, stop)[number][:, *rest]

    return jax.make_array_from_callback(like.shape, like.sharding, shard)
