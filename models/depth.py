"""Runs a model's blocks in sequence: unrolled or scanned, with or without rematerialisation."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from models.config import RematName
from models.layout import block_name, stack, take

Constrain = Callable[[jax.Array], jax.Array]
POLICIES: dict[RematName, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def identity(x: jax.Array) -> jax.Array:
    """The constraint that does nothing."""
    return x


def make_blocks(make: Callable[[], nnx.Module], layers: int, *, scanned: bool) -> nnx.Module:
    """Blocks by name; or, if scanned, one block whose parameters have a layer axis."""
    blocks = [make() for _ in range(layers)]
    if not scanned:
        return nnx.Dict({block_name(layer): block for layer, block in enumerate(blocks)})
    graph, *_ = nnx.split(blocks[0])
    states = [nnx.state(block) for block in blocks]
    return nnx.merge(graph, nnx.spmd.add_axis(stack(states), 0, {nnx.PARTITION_NAME: None}))


def through_blocks(
    blocks: Any,
    call: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    x_BxTxD: jax.Array,
    per_layer: Any = None,
    *,
    layers: int,
    remat: RematName = "none",
    constrain: Constrain = identity,
) -> tuple[jax.Array, Any]:
    """Runs the residual stream through all blocks.

    Args:
      blocks: the result of `make_blocks`.
      call: `(block, x, own) -> (x, y)`, where `own` is the block's slice of `per_layer`.
      x_BxTxD: float[B, T, D].
      per_layer: tree of arrays [layers, ...].
      layers: the number of blocks.
      remat: what the backward pass recomputes.
      constrain: applied to x after each block, which is all that `remat="full"` stores.

    Returns:
      (float[B, T, D], the stacked y of all blocks, [layers, ...]).
    """
    scanned = not isinstance(blocks, nnx.Dict)
    graph = nnx.graphdef(blocks if scanned else blocks[block_name(0)])

    def run(state, x, own):
        return call(nnx.merge(graph, state), x, own)

    if remat != "none":
        # In a scan the compiler cannot merge the recomputation with the forward pass anyway.
        run = jax.checkpoint(run, policy=POLICIES[remat], prevent_cse=not scanned)

    def body(x, layer):
        x, y = run(layer[0], x, layer[1])
        return constrain(x), y

    if scanned:
        return jax.lax.scan(body, x_BxTxD, (nnx.state(blocks), per_layer), length=layers)
    ys = []
    for layer in range(layers):
        state = nnx.state(blocks[block_name(layer)])
        x_BxTxD, y = body(x_BxTxD, (state, take(per_layer, layer)))
        ys.append(y)
    return x_BxTxD, stack(ys)
