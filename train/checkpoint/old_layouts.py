"""Reads optimizer states of older versions in the layout of this one."""

from typing import Any

import jax
import numpy as np

from train.checkpoint import leaves

ADDED = {"zero": 0, "zero_leaves": 0, "nonfinite": 0}
"""Last name in the path of a counter that came later -> its first value."""


def added(saved: Any, wanted: Any) -> dict[str, Any]:
    """Name -> first value, for the leaves of `wanted` that are newer than `saved`."""
    ends = {
        name: name.rpartition("/")[2] for name in leaves.named(wanted).keys() - leaves.named(saved)
    }
    return {name: ADDED[end] for name, end in ends.items() if end in ADDED}


def in_older_layout(saved: Any, wanted: Any) -> Any:
    """The leaves of `wanted` in the containers of `saved`, without the leaves that it lacks."""
    named = leaves.named(wanted)

    def target(path: Any, leaf: Any) -> Any:
        return named[leaves.name_of(path)]

    return jax.tree_util.tree_map_with_path(target, saved)


def in_this_layout(loaded: Any, wanted: Any, new: dict[str, Any]) -> Any:
    """The loaded leaves in the containers of `wanted`, with first values for new leaves."""
    have = leaves.named(loaded)

    def leaf(path: Any, shape: Any) -> Any:
        name = leaves.name_of(path)
        if name not in new:
            return have[name]
        first = np.full(shape.shape, new[name], shape.dtype)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: first[index])

    return jax.tree_util.tree_map_with_path(leaf, wanted)
