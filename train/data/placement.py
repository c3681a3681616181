"""Places the rows of a batch on the devices of a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def to_mesh(
    make_rows: Callable[[slice], np.ndarray],
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """One global array; each process makes only the rows that its own devices hold.

    Args:
        make_rows: slice of the leading axis -> array [rows, *shape[1:]], for example
            `lambda rows: tokens[rows]`.
        shape: the global shape, such as (B, T) for the inputs of a batch.
        sharding: any sharding of that shape.

    Returns:
        The global array [*shape].
    """
    # Devices along other mesh axes hold the same rows, and JAX calls once for each device.
    make = functools.cache(lambda start, stop: make_rows(slice(start, stop)))

    def shard(index: Any) -> np.ndarray:
        rows, *rest = index
        start, stop, _ = rows.indices(shape[0])
        return make(start, stop)[:, *rest]

    return jax.make_array_from_callback(shape, sharding, shard)
