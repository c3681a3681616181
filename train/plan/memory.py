"""Bytes of a training step on one device, by hand from shapes.

What must be there: state and batch exactly, activations as autodiff keeps them for its way back.
XLA's own layout, copies and order of work are left out; `train.plan.plan` compares.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

import models
from train import data
from train.config.schema import Config
from train.optimizers.sophia import SophiaG, SophiaH
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


class Cut(NamedTuple):
    """What of a micro-batch one device bears."""

    rows: int
    share: float  # of the rows, whose curvature is sampled, or as many where some devices are idle
    groups: int  # whose gradients of one parameter live at once; 0 if nothing is sampled
    rounds: int  # one after the other, each with its own sums over devices
    draws: int  # of labels or probes
    sampled: int  # micro-batches, of all
    beside: bool  # groups go side by side
    apart: bool  # with idle devices beside them, and the gradient of all rows by itself


def cut(config: Config, mesh: Mesh, samples: bool) -> Cut:
    """How a mesh and an optimizer cut a micro-batch; `samples` on a step that takes curvature."""
    rows = config.batch_size // config.accumulation // row_devices(mesh)
    if not samples or not isinstance(config.optim, SophiaG | SophiaH):
        return Cut(rows, 0.0, 0, 0, 0, 0, False, False)
    size, devices = (config.batch_size, config.accumulation), row_devices(mesh)
    groups, shards = config.optim.groups_of(*size), config.optim.shards(devices, *size)
    every, stride = config.optim.strides(*size)
    rounds = math.ceil(groups / shards)
    return Cut(
        rows=rows,
        share=rounds * shards / groups / stride,
        groups=max(shards // devices, 1),
        rounds=rounds,
        draws=config.optim.num_samples,
        sampled=config.accumulation // every,
        beside=shards > 1,
        apart=groups % shards > 0,
    )


def memory(config: Config, abstract: Any, mesh: Mesh, samples: bool) -> Memory:
    """Bytes of a step on one device.

    Args:
      config: its config.
      abstract: the `TrainState`, as shapes with shardings.
      mesh: theirs.
      samples: whether this step samples curvature.
    """
    params, tensor = jax.tree.leaves(abstract.params), mesh.shape["tensor"]
    here, whole = sum(map(shard_bytes, params)), _whole(config, abstract.params)
    part = cut(config, mesh, samples)
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


def _live(config: Config, part: Cut) -> float:
    """Rows that go forward and back at once: a sample in rounds is apart from the other rows."""
    if part.rounds > 1 and not part.apart and isinstance(config.optim, SophiaG):
        return part.rows * max(1 - part.share, part.share / part.rounds)
    return part.rows


def _curvature(
    config: Config, part: Cut, here: int, largest: int, gathered: int, tensor: int
) -> int:
    """The sample itself, and what the passes that make it keep beside the gradient's.

    Gauss-Newton-Bartlett goes back twice from the sampled rows, and what it goes back through
    stays until both are done. Hutchinson carries a tangent for each of their activations.
    """
    tokens = part.rows * part.share / part.rounds * config.sequence_length
    loss, blocks = logits(config, tensor), activations(config, tensor)
    if part.apart:  # XLA holds what gradient and sample keep at once, and gathers for each
        return round(here + part.groups * largest + tokens * (loss + blocks) + gathered)
    if isinstance(config.optim, SophiaG):
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
    if config.model.attention == "cudnn" and not isinstance(config.optim, SophiaH):
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
