"""The two layouts of a model's blocks: one subtree per block, or one tree with a layer axis."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def block_name(layer: int) -> str:
    """The key of a block among the parameters."""
    # A string, because checkpoints turn integer keys into strings; of two digits, because pytrees
    # sort the keys of dicts, and "10" sorts before "2".
    return f"{layer:02d}"


def is_stacked(params: Any) -> bool:
    """Whether the blocks of a tree shaped like params have a layer axis (`scan_layers`)."""
    if not isinstance(params, Mapping) or "blocks" not in params:
        return False
    return block_name(0) not in params["blocks"]


def stack_blocks(params: Any) -> Any:
    """Converts a tree to the layout of `scan_layers`.

    Args:
      params: any tree of arrays with the keys of `split(config).init`, such as parameters, a
        gradient or a moment. NumPy arrays stay in host memory.

    Returns:
      The tree with one tree of leaves [layers, ...] in `params["blocks"]`; unchanged if it has
      that layout already.

    >>> blocks = {"00": {"up": np.zeros((2, 3))}, "01": {"up": np.ones((2, 3))}}
    >>> stack_blocks({"blocks": blocks})["blocks"]["up"].shape
    (2, 2, 3)
    """
    if "blocks" not in params or is_stacked(params):
        return params
    blocks = params["blocks"]
    return params | {"blocks": stack([blocks[block_name(i)] for i in range(len(blocks))])}


def unstack_blocks(params: Any) -> Any:
    """Converts a tree to the layout without `scan_layers`: the inverse of `stack_blocks`.

    Args:
      params: any tree of arrays with the keys of `split(config).init`.

    Returns:
      The tree with one subtree of `params["blocks"]` for each block: "00", "01", ...

    >>> sorted(unstack_blocks({"blocks": {"up": np.zeros((2, 5, 3))}})["blocks"])
    ['00', '01']
    """
    if not is_stacked(params):
        return params
    blocks = params["blocks"]
    layers = jax.tree.leaves(blocks)[0].shape[0]
    return params | {"blocks": {block_name(i): take(blocks, i) for i in range(layers)}}


def logical_ndims(params: Any) -> Any:
    """Number of dimensions of each leaf, not counting the layer axis of `scan_layers`.

    Args:
      params: any tree of arrays or shapes with the keys of `split(config).init`.

    Returns:
      An int for each leaf: 1 for a vector and 2 for a matrix, stacked or not.

    >>> logical_ndims({"blocks": {"scale": np.ones((2, 8))}, "norm": {"scale": np.ones(8)}})
    {'blocks': {'scale': 1}, 'norm': {'scale': 1}}
    """
    stacked = is_stacked(params)
    return jax.tree.map_with_path(
        lambda path, x: x.ndim - (stacked and path[0].key == "blocks"), params
    )


def stack(trees: list[Any]) -> Any:
    """Stacks trees along a new leading axis; NumPy arrays stay in host memory."""

    def join(*leaves):
        join: Callable[..., Any] = np.stack if isinstance(leaves[0], np.ndarray) else jnp.stack
        return join(leaves)

    return jax.tree.map(join, *trees)


def take(tree: Any, index: int) -> Any:
    """One of the trees that were stacked."""
    return jax.tree.map(lambda x: x[index], tree)
