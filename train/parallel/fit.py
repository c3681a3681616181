"""Whether a batch and a model fit a mesh."""

from jax.sharding import Mesh

import models
from train.parallel.mesh import row_devices


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError if the rows do not divide over devices and micro-batches."""
    devices = row_devices(mesh)
    parts = devices * accumulation
    if batch_size % parts:
        cut = f" in {accumulation} micro-batches" * (accumulation > 1)
        raise ValueError(
            f"batch_size={batch_size} does not divide over {devices} devices{cut}; choose "
            f"a multiple of {parts}."
        )


def check_model(model: models.DecoderConfig | models.EncoderConfig, mesh: Mesh) -> None:
    """Raises ValueError if an axis of a parameter does not divide; heads are never cut."""
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    if model.width % fsdp:
        raise ValueError(
            f"--mesh.fsdp {fsdp} does not divide the model's width of {model.width}, along which "
            "parameters are sharded; choose a factor of it."
        )
    sizes = {
        "heads": model.heads,
        "key/value heads": getattr(model, "kv_heads", 0) or model.heads,
        "hidden units (ffn_width)": model.ffn_width or 4 * model.width,
        "words (--model.vocab-multiple pads them)": model.padded_vocab,
    }
    for name, size in sizes.items():
        if size % tensor:
            raise ValueError(
                f"--mesh.tensor {tensor} does not divide the model's {size} {name}; choose a "
                "common factor of them."
            )
