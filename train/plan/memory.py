"""Bytes of a training step on one device, estimated from shapes.

State and batch are exact. Activations are those that autodiff keeps for the backward pass. XLA's
layouts, copies and scheduling are left out; `train.plan.plan` compares with XLA's own figures.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

import models
from train import inputs
from train.config.schema import Config
from train.optimizers.base import SamplingPlan
from train.parallel.mesh import row_devices
from train.plan.flops import Model

FLOAT32 = 4


class Memory(NamedTuple):
    """Peak bytes on one device."""

    parameters: int
    optimizer: int  # optimizer state and step counter
    batch: int
    gathered: int  # parameters gathered over "fsdp"
    gradients: int  # the device's shards, and the largest gradient before its reduction
    activations: int  # of all blocks, kept for the backward pass
    loss: int  # logits and their gradient
    curvature: int  # what a curvature sample adds

    @property
    def arguments(self) -> int:
        """Bytes that live between steps."""
        return self.parameters + self.optimizer + self.batch

    @property
    def temporaries(self) -> int:
        """Bytes that live during a step only."""
        return sum(self) - self.arguments

    @property
    def total(self) -> int:
        return sum(self)


class DeviceShare(NamedTuple):
    """Per-device share of a micro-batch, and how its curvature sample is split."""

    rows: int
    share: float = 0.0  # fraction of the rows that is sampled; idle slots count as sampled
    groups: int = 0  # gradients of one parameter that are alive at once; 0 samples nothing
    rounds: int = 0  # sequential rounds of groups, each with its own reduction over devices
    draws: int = 0  # labels or probes in one sample
    sampled: int = 0  # micro-batches that are sampled
    parallel: bool = False  # groups go side by side
    idle: bool = False  # the last round has idle slots, so the sample shares no forward pass
    cost: Literal["", "backward", "product"] = ""  # of a draw, as in `SamplingPlan`


def device_share(config: Config, mesh: Mesh, sampling: SamplingPlan | None) -> DeviceShare:
    """How a mesh and a sampling plan divide a micro-batch.

    Args:
      config: of the run.
      mesh: that it runs on.
      sampling: of a step that samples curvature; None for a plain step.
    """
    devices = row_devices(mesh)
    rows = config.batch_size // config.accumulation // devices
    if sampling is None:
        return DeviceShare(rows)
    groups, parallel = sampling.groups, sampling.parallel_groups
    return DeviceShare(
        rows=rows,
        share=sampling.rounds * parallel / groups / sampling.row_stride,
        groups=max(parallel // devices, 1),
        rounds=sampling.rounds,
        draws=sampling.draws,
        sampled=config.accumulation // sampling.microbatch_stride,
        parallel=parallel > 1,
        idle=groups % parallel > 0,
        cost=sampling.cost,
    )


def memory(config: Config, abstract: Any, mesh: Mesh, sampling: SamplingPlan | None) -> Memory:
    """Bytes of a step on one device.

    Args:
      config: of the run.
      abstract: the `TrainState`, as shapes with shardings.
      mesh: of the shardings.
      sampling: of a step that samples curvature; None for a plain step.
    """
    params, tensor = jax.tree.leaves(abstract.params), mesh.shape["tensor"]
    here, whole = sum(map(shard_bytes, params)), _whole(config, abstract.params)
    batch = jax.tree.leaves(inputs.batch_shapes(config, mesh))
    part = device_share(config, mesh, sampling)
    if part.cost == "product":  # cuDNN attention has no second derivative
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, attention="xla")
        )
    rows, gathered = _live(config, part), sum(whole) if mesh.shape["fsdp"] > 1 else 0
    return Memory(
        parameters=here,
        optimizer=sum(map(shard_bytes, jax.tree.leaves((abstract.step, abstract.opt_state)))),
        batch=sum(map(shard_bytes, batch)),
        gathered=gathered,
        gradients=here * (1 + (config.accumulation > 1)) + max(whole),
        activations=round(rows * config.sequence_length * activations(config, tensor)),
        loss=round(rows * config.sequence_length * logits(config, tensor)),
        curvature=_curvature(config, part, here, max(whole), gathered, tensor)
        if part.groups
        else 0,
    )


def _whole(config: Config, params: Any) -> list[int]:
    """Bytes of each parameter gathered over "fsdp"; of scanned blocks one layer."""
    return [
        gathered_bytes(x) // (config.model.layers if scanned(config, path) else 1)
        for path, x in jax.tree.leaves_with_path(params)
    ]


def scanned(config: Config, path: Any) -> bool:
    """Whether a parameter stacks all layers, which are gathered one at a time."""
    return config.model.scan_layers and in_block(path)


def in_block(path: Any) -> bool:
    return jax.tree_util.keystr(path).startswith("['blocks']")


def _live(config: Config, part: DeviceShare) -> float:
    """Rows whose activations are alive at once: sampled rounds and other rows take turns."""
    if part.rounds > 1 and not part.idle and part.cost == "backward":
        return part.rows * max(1 - part.share, part.share / part.rounds)
    return part.rows


def _curvature(
    config: Config, part: DeviceShare, here: int, largest: int, gathered: int, tensor: int
) -> int:
    """Bytes of the sample, and what its passes keep beside those of the gradient.

    A draw of cost "backward" runs a second backward pass over the sampled rows, whose activations
    stay alive until both passes are done. A Hessian-vector product carries a tangent for each
    activation.
    """
    tokens = part.rows * part.share / part.rounds * config.sequence_length
    loss, blocks = logits(config, tensor), activations(config, tensor)
    if part.idle:  # XLA keeps the gradient's and the sample's activations, and gathers for each
        return round(here + part.groups * largest + tokens * (loss + blocks) + gathered)
    if part.cost == "backward":
        rest = largest if part.share < 1 else 0  # the other rows have a backward pass of their own
        twice = max(tokens * loss, tokens * 2 * backward_bytes(config, tensor) - tokens * loss)
        return round(here + part.groups * largest + rest + twice)
    apart = part.share < 1 or part.rounds > 1
    both = tokens * (2 if apart else 1) * (loss + blocks)
    if part.rounds > 1:  # in turn, after the gradient
        both = max(both - part.rows * config.sequence_length * (loss + blocks), 0)
    return round(2 * here + both)


def activations(config: Config, tensor: int = 1) -> float:
    """Bytes per token that the blocks keep for the backward pass.

    A block keeps, without `remat`: the inputs of its norms, centred (LayerNorm), normalised and
    scaled; queries, keys, values and the output of attention; masked scores and their softmax
    (cuDNN keeps one sum per head); the hidden layer before, in and after its nonlinearity. With
    `remat` the blocks keep their inputs, and with "dots" their matrix products; all else is kept
    for one block at a time.
    """
    model, size = config.model, itemsize(config.model)
    encoder = isinstance(model, models.EncoderConfig)
    heads, head = model.heads, model.head_width
    shared = heads if encoder else model.kv_heads or heads
    gated = not encoder and model.mlp == "swiglu"
    centred = encoder or model.norm == "layernorm"
    norm = model.width * (2 * size + FLOAT32 * (1 + centred))
    attention = 2 * head * (heads + shared) * size
    mlp, scores = (3 + gated) * _hidden(model) * size, _scores(config)
    if model.scan_layers and model.remat == "none":
        mlp, scores = 2 * mlp, 1.5 * scores  # the loop stores what fusion would recompute
    block = 2 * norm + (attention + scores + mlp) / tensor
    dots = head * (heads + 2 * shared) + (1 + gated) * _hidden(model)
    kept = {
        "none": block,
        "dots": size * (3 * model.width + dots / tensor),
        "full": size * model.width,
    }[model.remat]
    return model.layers * kept + (block if model.remat != "none" else 0) + norm


def backward_bytes(config: Config, tensor: int) -> float:
    """Bytes per token of the gradients that are alive in the backward pass of one block."""
    size, width = itemsize(config.model), config.model.width
    return 4 * width * size + (2 * _hidden(config.model) * size + _scores(config)) / tensor


def _scores(config: Config) -> int:
    """Bytes per token of float32 attention scores and their softmax, or of cuDNN's sums."""
    if config.model.attention == "cudnn":
        return FLOAT32 * config.model.heads
    return 2 * FLOAT32 * config.model.heads * config.sequence_length


def _hidden(config: Model) -> int:
    return config.ffn_width or 4 * config.width


def itemsize(config: Model) -> int:
    """Bytes of one activation."""
    return 2 if config.dtype == "bfloat16" else FLOAT32


def logits(config: Config, tensor: int = 1) -> float:
    """Bytes per token of the float32 logits that are alive at once, and of their gradient.

    Classifiers have next to none.
    """
    if isinstance(config.model, models.EncoderConfig) and config.model.classes:
        return 0.0
    share = (
        min(config.loss_chunk or config.sequence_length, config.sequence_length)
        / config.sequence_length
    )
    return 2 * FLOAT32 * config.model.padded_vocab * share / tensor


def shard_bytes(x: Any) -> int:
    """Bytes of one device's shard of an abstract array."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def gathered_bytes(x: Any) -> int:
    """Bytes on one device once the array is gathered over "fsdp"."""
    axes = [(axis,) if isinstance(axis, str) else axis for axis in x.sharding.spec if axis]
    return shard_bytes(x) * (x.sharding.mesh.shape["fsdp"] if "fsdp" in sum(axes, ()) else 1)
