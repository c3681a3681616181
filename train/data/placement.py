"""Rows of a batch on the devices that hold them."""

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
    """One global array of which each process makes only the rows that its devices hold.

    Args:
        make_rows: rows of the leading axis -> array [rows, *shape[1:]], for example
            `lambda rows: batch(..., rows=rows)`.
        shape: the global shape, (B, T + 1) for a batch.
        sharding: any sharding of that shape.

    Returns:
        The array [*shape], placed.
    """
    # Devices along other mesh axes hold the same rows, and JAX asks once a device.
    make = functools.cache(lambda start, stop: make_rows(slice(start, stop)))

    def shard(index: Any) -> np.ndarray:
        rows, *rest = index
        start, stop, _ = rows.indices(shape[0])
        return make(start, stop)[:, *rest]

    return jax.make_array_from_callback(shape, sharding, shard)
