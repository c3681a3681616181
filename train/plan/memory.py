"""Bytes of a training step on one device, by hand from shapes.

What must be there: state and batch exactly, activations as autodiff keeps them for its way back.
XLA's own layout, copies and order of work are left out; `train.plan.plan` compares.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

import models
from train import data
from train.config.schema import Config
from train.optimizers.base import SamplingPlan
from train.parallel.mesh import row_devices
from train.plan.flops import Model

FLOAT32 = 4


class Memory(NamedTuple):
    """Bytes on one device, when a step needs most."""

    parameters: int
    optimizer: int  # its state, and the number of the step
    batch: int
    gathered: int  # parameters as matrix products read them: whole over "fsdp"
    gradients: int  # the device's share, and the largest before it is summed over devices
    activations: int  # of all blocks, kept for the way back
    loss: int  # logits and their gradient
    curvature: int  # what a sample adds to all that

    @property
    def arguments(self) -> int:
        """What is there between steps."""
        return self.parameters + self.optimizer + self.batch

    @property
    def temporaries(self) -> int:
        """What a step needs besides."""
        return sum(self) - self.arguments

    @property
    def total(self) -> int:
        return sum(self)


class DeviceShare(NamedTuple):
    """Per-device share of a micro-batch, and how its curvature sample is split."""

    rows: int
    share: float = 0.0  # of the rows that are sampled, devices that wait counted as if they worked
    groups: int = 0  # whose gradients of one parameter are alive at once; 0 samples nothing
    rounds: int = 0  # groups one after the other, each with its own sums over devices
    draws: int = 0  # of labels or probes
    sampled: int = 0  # micro-batches, of all
    parallel: bool = False  # groups go side by side
    idle: bool = False  # a round leaves devices idle, so the sample shares no forward pass
    cost: Literal["", "backward", "product"] = ""  # of a draw


def device_share(config: Config, mesh: Mesh, sampling: SamplingPlan | None) -> DeviceShare:
    """How a mesh and a sampling plan divide a micro-batch; no plan on a step that samples nothing.

    Args:
      config: of the run.
      mesh: it runs on.
      sampling: of a step that samples curvature, else None.
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
      config: its config.
      abstract: the `TrainState`, as shapes with shardings.
      mesh: theirs.
      sampling: of a step that samples curvature, else None.
    """
    params, tensor = jax.tree.leaves(abstract.params), mesh.shape["tensor"]
    here, whole = sum(map(shard_bytes, params)), _whole(config, abstract.params)
    part = device_share(config, mesh, sampling)
    if part.cost == "product":  # cuDNN attention has no second derivative
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, attention="xla")
        )
    rows, gathered = _live(config, part), sum(whole) if mesh.shape["fsdp"] > 1 else 0
    return Memory(
        parameters=here,
        optimizer=sum(map(shard_bytes, jax.tree.leaves((abstract.step, abstract.opt_state)))),
        batch=batch_bytes(config) // row_devices(mesh),
        gathered=gathered,
        gradients=here * (1 + (config.accumulation > 1)) + max(whole),
        activations=round(rows * config.sequence_length * activations(config, tensor)),
        loss=round(rows * config.sequence_length * logits(config, tensor)),
        curvature=_curvature(config, part, here, max(whole), gathered, tensor)
        if part.groups
        else 0,
    )


def _whole(config: Config, params: Any) -> list[int]:
    """Bytes of each parameter once it is whole over "fsdp"; of a scanned block's, one layer."""
    return [
        gathered_bytes(x) // (config.model.layers if scanned(config, path) else 1)
        for path, x in jax.tree.leaves_with_path(params)
    ]


def scanned(config: Config, path: Any) -> bool:
    """Whether a parameter is that of all layers, which are gathered one by one."""
    return config.model.scan_layers and in_block(path)


def in_block(path: Any) -> bool:
    return jax.tree_util.keystr(path).startswith("['blocks']")


def batch_bytes(config: Config) -> int:
    """Of all rows of a step."""
    sizes = {"batch_size": config.batch_size, "sequence_length": config.sequence_length}
    shapes = jax.tree.leaves(data.batch_shapes(config.data, **sizes))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)


def _live(config: Config, part: DeviceShare) -> float:
    """Rows that go forward and back at once: a sample in rounds is apart from the other rows."""
    if part.rounds > 1 and not part.idle and part.cost == "backward":
        return part.rows * max(1 - part.share, part.share / part.rounds)
    return part.rows


def _curvature(
    config: Config, part: DeviceShare, here: int, largest: int, gathered: int, tensor: int
) -> int:
    """The sample itself, and what the passes that make it keep beside the gradient's.

    Gauss-Newton-Bartlett goes back twice from the sampled rows, and what it goes back through
    stays until both are done. Hutchinson carries a tangent for each of their activations.
    """
    tokens = part.rows * part.share / part.rounds * config.sequence_length
    loss, blocks = logits(config, tensor), activations(config, tensor)
    if part.idle:  # XLA holds what gradient and sample keep at once, and gathers for each
        return round(here + part.groups * largest + tokens * (loss + blocks) + gathered)
    if part.cost == "backward":
        rest = largest if part.share < 1 else 0  # the other rows go back by themselves
        twice = max(tokens * loss, tokens * 2 * _way_back(config, tensor) - tokens * loss)
        return round(here + part.groups * largest + rest + twice)
    apart = part.share < 1 or part.rounds > 1
    both = tokens * (2 if apart else 1) * (loss + blocks)
    if part.rounds > 1:  # one by one, after the gradient
        both = max(both - part.rows * config.sequence_length * (loss + blocks), 0)
    return round(2 * here + both)


def activations(config: Config, tensor: int = 1) -> float:
    """Bytes of a token that the blocks keep for their way back.

    A norm's input, centred (LayerNorm), scaled to 1, and its output; queries, keys, values and what
    attention makes of them; its masked scores and their softmax (cuDNN keeps one sum of a head);
    the feed-forward layer before and after its nonlinearity, and that itself. With `remat` of all
    blocks their inputs, and products with parameters or not, and the rest of one block.
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
        mlp, scores = 2 * mlp, 1.5 * scores  # what a loop writes out no fusion can compute again
    block = 2 * norm + (attention + scores + mlp) / tensor
    dots = head * (heads + 2 * shared) + (1 + gated) * _hidden(model)
    kept = {
        "none": block,
        "dots": size * (3 * model.width + dots / tensor),
        "full": size * model.width,
    }[model.remat]
    return model.layers * kept + (block if model.remat != "none" else 0) + norm


def _way_back(config: Config, tensor: int) -> float:
    """Bytes of a token that one block holds on its way back: gradients of what it made."""
    size, width = itemsize(config.model), config.model.width
    return 4 * width * size + (2 * _hidden(config.model) * size + _scores(config)) / tensor


def _scores(config: Config) -> int:
    """Of a token: float32 scores and their softmax, or cuDNN's sums."""
    if config.model.attention == "cudnn":
        return FLOAT32 * config.model.heads
    return 2 * FLOAT32 * config.model.heads * config.sequence_length


def _hidden(config: Model) -> int:
    return config.ffn_width or 4 * config.width


def itemsize(config: Model) -> int:
    """Of an activation."""
    return 2 if config.dtype == "bfloat16" else FLOAT32


def logits(config: Config, tensor: int = 1) -> float:
    """Bytes of a token's float32 logits and their gradient, as the share held at once.

    Of classes there are next to none.
    """
    if isinstance(config.model, models.EncoderConfig) and config.model.classes:
        return 0.0
    share = (
        min(config.loss_chunk or config.sequence_length, config.sequence_length)
        / config.sequence_length
    )
    return 2 * FLOAT32 * config.model.padded_vocab * share / tensor


def shard_bytes(x: Any) -> int:
    """Of an array that is only a shape and a sharding: what one device holds."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def gathered_bytes(x: Any) -> int:
    """What one device holds of it once it is whole over "fsdp"."""
    axes = [(axis,) if isinstance(axis, str) else axis for axis in x.sharding.spec if axis]
    return shard_bytes(x) * (x.sharding.mesh.shape["fsdp"] if "fsdp" in sum(axes, ()) else 1)
