"""The two layouts of a model's blocks: a subtree for each, or one tree with a layer axis."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def block_name(layer: int) -> str:
    """The key of a block among the parameters."""
    # A string, since checkpoints turn integer keys into strings. Looked up by name, since a
    # pytree's dicts come back sorted, and "10" sorts before "2".
    return f"{layer:02d}"


def is_stacked(params: Any) -> bool:
    """Whether the blocks of a tree shaped as params have a layer axis (`scan_layers`)."""
    if not isinstance(params, Mapping) or "blocks" not in params:
        return False
    return block_name(0) not in params["blocks"]


def stack_blocks(params: Any) -> Any:
    """A tree shaped as params, in the layout of `scan_layers`.

    Args:
      params: parameters, a gradient, a moment: any tree of arrays with `split(config).init`'s keys.
        NumPy arrays stay in host memory.

    Returns:
      The same with `params["blocks"]` one tree whose leaves are [layers, ...]; as it is where it
      has that layout.

    >>> blocks = {"00": {"up": np.zeros((2, 3))}, "01": {"up": np.ones((2, 3))}}
    >>> stack_blocks({"blocks": blocks})["blocks"]["up"].shape
    (2, 2, 3)
    """
    if "blocks" not in params or is_stacked(params):
        return params
    blocks = params["blocks"]
    return params | {"blocks": stack([blocks[block_name(i)] for i in range(len(blocks))])}


def unstack_blocks(params: Any) -> Any:
    """A tree shaped as params, in the layout without `scan_layers`: undoes `stack_blocks`.

    Args:
      params: any tree of arrays with `split(config).init`'s keys.

    Returns:
      The same with a subtree of `params["blocks"]` for each block: "00", "01", ...

    >>> sorted(unstack_blocks({"blocks": {"up": np.zeros((2, 5, 3))}})["blocks"])
    ['00', '01']
    """
    if not is_stacked(params):
        return params
    blocks = params["blocks"]
    layers = jax.tree.leaves(blocks)[0].shape[0]
    return params | {"blocks": {block_name(i): take(blocks, i) for i in range(layers)}}


def logical_ndims(params: Any) -> Any:
    """Dimensions of each leaf, without the layer axis that `scan_layers` adds.

    Args:
      params: any tree with `split(config).init`'s keys, of arrays or of their shapes.

    Returns:
      An int for each leaf: 1 for a vector and 2 for a matrix, one of a stack too.

    >>> logical_ndims({"blocks": {"scale": np.ones((2, 8))}, "norm": {"scale": np.ones(8)}})
    {'blocks': {'scale': 1}, 'norm': {'scale': 1}}
    """
    stacked = is_stacked(params)
    return jax.tree.map_with_path(
        lambda path, x: x.ndim - (stacked and path[0].key == "blocks"), params
    )


def stack(trees: list[Any]) -> Any:
    """Trees as one, with a leading axis; in host memory if they are."""

    def join(*leaves):
        join: Callable[..., Any] = np.stack if isinstance(leaves[0], np.ndarray) else jnp.stack
        return join(leaves)

    return jax.tree.map(join, *trees)


def take(tree: Any, index: int) -> Any:
    """One of the trees that `stack` joined."""
    return jax.tree.map(lambda x: x[index], tree)
