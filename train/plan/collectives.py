"""Collectives of a training step, estimated from shapes."""

from typing import Any

import jax
from jax.sharding import Mesh

import models
from train.config.schema import Config
from train.optimizers.base import SamplingPlan
from train.parallel.mesh import row_devices
from train.plan.flops import Model
from train.plan.hlo import Collective
from train.plan.memory import (
    DeviceShare,
    device_share,
    gathered_bytes,
    in_block,
    itemsize,
    scanned,
    shard_bytes,
)

TABLE = "['tokens']['embedding']"


def collectives(
    config: Config,
    abstract: Any,
    mesh: Mesh,
    sampling: SamplingPlan | None,
    *,
    scatter: bool = True,
) -> dict[str, Collective]:
    """Collectives of one device in a step: kind -> number of arrays, bytes of the results.

    Each pass over a micro-batch gathers each matrix and reduces its gradient. A tied table has two
    gradients, as input and as output embedding. Scanned and rematerialised blocks are gathered
    again in each backward pass. Over "tensor" a block reduces its two outputs, and in the backward
    pass its two inputs.

    Args:
      config: of the run.
      abstract: the `TrainState`, as shapes with shardings.
      mesh: of the shardings.
      sampling: of a step that samples curvature; None for a plain step.
      scatter: gradients are reduce-scattered, as on GPU and TPU. XLA on CPU all-reduces them.
    """
    part = device_share(config, mesh, sampling)
    gathers, sums, again = _passes(config, part)
    again_gathered = config.model.scan_layers or config.model.remat != "none"
    found = {"all-gather": [0, 0], "all-reduce": [0, 0], "reduce-scatter": [0, 0]}

    def add(kind: str, times: int, size: int) -> None:
        found[kind][0] += times
        found[kind][1] += times * size

    for path, x in jax.tree.leaves_with_path(abstract.params):
        shard, whole = shard_bytes(x), gathered_bytes(x)
        times = sums + again * (tied(config.model) and jax.tree_util.keystr(path) == TABLE)
        if shard < whole:
            layers = config.model.layers if scanned(config, path) else 1
            add(
                "all-gather",
                layers * (gathers + sums * (again_gathered and in_block(path))),
                whole // layers,
            )
            add(*(("reduce-scatter", times, shard) if scatter else ("all-reduce", times, whole)))
        if mesh.shape["data"] > 1 or (shard == whole and row_devices(mesh) > 1):
            add("all-reduce", times, shard)
    if mesh.shape["tensor"] > 1:
        stream = part.rows * config.sequence_length * config.model.width * itemsize(config.model)
        add("all-reduce", config.accumulation * _tensor_sums(config.model, scatter), stream)
    return {kind: Collective(*both) for kind, both in found.items() if both[0]}


def _tensor_sums(config: Model, together: bool) -> int:
    """Reductions of activations over "tensor": two per block and pass, the embeddings, the head.

    On CPU gradients with respect to queries, keys and values (gate and up) are reduced one by one.
    """
    gated = not isinstance(config, models.EncoderConfig) and config.mlp == "swiglu"
    return 2 + config.layers * (4 if together else 6 + gated)


def tied(config: Model) -> bool:
    """Whether input and output embeddings are one table."""
    return not config.classes if isinstance(config, models.EncoderConfig) else config.tied


def _passes(config: Config, part: DeviceShare) -> tuple[int, int, int]:
    """Passes of a step: gathers of parameters, reductions of gradients, more of a tied table.

    Rounds share their gathers, as do a single group and the other rows. A Hessian-vector product
    gathers its probe as well, and each matrix is in two products of a gradient's tangent. Groups
    side by side add the two gradients of a tied table before they are reduced.
    """
    if not part.groups:
        return config.accumulation, config.accumulation, config.accumulation
    if part.cost == "product":
        products = part.rounds * part.draws
        gathers, sums, again = products, 2 * products, products
    elif part.idle:
        gathers, sums, again = 1, part.rounds * part.draws, 0
    else:
        rest = part.share < 1
        gathers = rest and (part.parallel or part.rounds > 1)
        sums = part.rounds * (1 + part.draws) + rest - 1
        again = rest - 1 if part.parallel else sums
    plain, n = config.accumulation, part.sampled
    return plain + n * gathers, plain + n * sums, plain + n * again
