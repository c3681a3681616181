"""The leaves of a state by name, and how the leaves of two states differ."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp


def differences(
    saved: Any, wanted: Any, *, part: bool = False, new: Collection[str] = ()
) -> list[str]:
    """Describes each leaf whose name, dtype or shape differs.

    Orbax alone would cast a leaf of another dtype, and not name a leaf of another shape.

    Args:
      saved: the state on disk; its leaves have a dtype and a shape.
      wanted: the state it is to be read as.
      part: ignore leaves that `wanted` lacks.
      new: names of further leaves to ignore.
    """
    have, want = _kinds(saved), _kinds(wanted)
    return [
        f"{name} is {have.get(name, 'absent')} on disk and {want.get(name, 'absent')} here"
        for name in sorted((want if part else have | want).keys() - set(new))
        if have.get(name) != want.get(name)
    ]


def named(tree: Any) -> dict[str, Any]:
    """Name, such as params/tokens/embedding -> leaf."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def name_of(path: Any) -> str:
    """The name of a path in a tree; the same for a tuple, a list and a NamedTuple."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def floats(tree: Any) -> dict[str, jax.Array]:
    """Name -> leaf, for the leaves that can hold a value that is not finite."""
    return {name: x for name, x in named(tree).items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def _kinds(tree: Any) -> dict[str, str]:
    return {name: f"{leaf.dtype}{[*leaf.shape]}" for name, leaf in named(tree).items()}
