"""Reads optimizer states of older versions in the layout of this one."""

from typing import Any

import jax
import numpy as np

from train.checkpoint import leaves

ADDED = {"zero": 0, "zero_leaves": 0, "nonfinite": 0}
"""Last name in the path of a counter that came later -> its first value."""

RENAMED = {
    "predicted_reduction/linear": "linear",
    "predicted_reduction/quadratic": "quadratic",
}
"""Ends of the names of leaves -> their ends in checkpoints from before `PredictedReduction`."""


def names(saved: Any, wanted: Any) -> dict[str, str]:
    """Names of the leaves of `wanted` -> their names in `saved`, which may be older ones."""
    have = leaves.named(saved)

    def name_there(name: str) -> str:
        for end, old_end in RENAMED.items():
            old = name.removesuffix(end) + old_end
            if name.endswith(f"/{end}") and name not in have and old in have:
                return old
        return name

    return {name: name_there(name) for name in leaves.named(wanted)}


def under_saved_names(saved: Any, wanted: Any) -> dict[str, Any]:
    """The leaves of `wanted` by the names that they have in `saved`."""
    there = names(saved, wanted)
    return {there[name]: leaf for name, leaf in leaves.named(wanted).items()}


def added(saved: Any, wanted: Any) -> dict[str, Any]:
    """Name -> first value, for the leaves of `wanted` that are newer than `saved`."""
    ends = {
        name: name.rpartition("/")[2] for name in leaves.named(wanted).keys() - leaves.named(saved)
    }
    return {name: ADDED[end] for name, end in ends.items() if end in ADDED}


def is_older(saved: Any, wanted: Any) -> bool:
    """Whether `saved` lacks leaves of `wanted`, or has them under older names."""
    there = under_saved_names(saved, wanted)
    return bool(added(saved, there)) or there.keys() != leaves.named(wanted).keys()


def in_older_layout(saved: Any, wanted: Any) -> Any:
    """The leaves of `wanted` in the containers of `saved`, without the leaves that it lacks."""
    named = under_saved_names(saved, wanted)

    def target(path: Any, leaf: Any) -> Any:
        return named[leaves.name_of(path)]

    return jax.tree_util.tree_map_with_path(target, saved)


def in_this_layout(loaded: Any, wanted: Any, new: dict[str, Any]) -> Any:
    """The loaded leaves in the containers of `wanted`, with first values for new leaves."""
    have, there = leaves.named(loaded), names(loaded, wanted)

    def leaf(path: Any, shape: Any) -> Any:
        name = leaves.name_of(path)
        if name not in new:
            return have[there[name]]
        first = np.full(shape.shape, new[name], shape.dtype)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: first[index])

    return jax.tree_util.tree_map_with_path(leaf, wanted)
