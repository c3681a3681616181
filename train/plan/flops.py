"""FLOPs of a model, estimated from shapes: matrix products alone, two for a multiply-add."""

import re

import models

Model = models.DecoderConfig | models.EncoderConfig
# Dense bfloat16 TFLOP/s of one JAX device, and a pattern of its `device_kind`: the first match.
# From NVIDIA's data sheets (figures "with sparsity" are twice as large), the tables of
# docs.cloud.google.com/tpu/docs and the device names in jax._src.tpu_info.
_CHIPS = {
    "A100": (312.0, "A100"),
    "H100 PCIe": (756.0, "H100 PCIe"),
    "H100 NVL": (835.0, "H100 NVL"),
    "H100": (989.4, "H100"),
    "H200 NVL": (835.0, "H200 NVL"),
    "H200": (989.4, "G?H200"),
    "B200": (2250.0, "B200"),
    "GB200": (2500.0, "GB200"),
    "B300": (2250.0, "B300"),
    "GB300": (2500.0, "GB300"),
    "TPU v4": (275.0, "TPU v4$"),
    "TPU v5e": (197.0, "TPU v5 ?(lite|e)"),
    "TPU v5p": (459.0, "TPU v5p?$"),
    "TPU v6e": (918.0, "TPU v6 ?(lite|e)"),
    "TPU7x": (2307.0 / 2, "TPU7x?"),  # Ironwood: each of a chip's two cores is a device
}
PEAKS = {name: peak for name, (peak, _) in _CHIPS.items()}


def peak_flops(kind: str, given: float | None = None) -> float | None:
    """Peak FLOP/s of a device; None if it is unknown.

    Args:
      kind: the `device_kind` of the device.
      given: TFLOP/s that override the table.

    >>> peak_flops("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    >>> peak_flops("TPU v5 lite"), peak_flops("TPU v5")
    (197000000000000.0, 459000000000000.0)
    """
    known = (peak for peak, reads in _CHIPS.values() if re.search(rf"\b({reads})(?!\w)", kind))
    teraflops = given or next(known, None)
    return teraflops and 1e12 * teraflops


def forward_flops(config: Model, length: int) -> tuple[float, float]:
    """FLOPs per token of the forward pass: (products with parameters, products in attention).

    Attention computes all of its T x T scores and masks half. A classification head reads one token
    of a sequence, and is left out.

    Args:
      config: of the model.
      length: T, tokens in a sequence.

    >>> forward_flops(models.PRESETS["tiny"], 64)
    (229376.0, 32768.0)
    """
    width, heads, head = config.width, config.heads, config.head_width
    hidden = config.ffn_width or 4 * width
    if isinstance(config, models.EncoderConfig):
        shared, matrices = heads, 2
        last = 0 if config.classes else width * (width + config.padded_vocab)
    else:
        shared, matrices = config.kv_heads or heads, {"gelu": 2, "swiglu": 3}[config.mlp]
        last = width * config.padded_vocab
    block = 2 * width * head * (heads + shared) + matrices * width * hidden
    return 2.0 * (config.layers * block + last), 4.0 * config.layers * length * heads * head


def model_flops(config: Model, rows: int, length: int) -> float:
    """FLOPs of loss and gradient, the numerator of MFU: the forward pass, and twice that backward.

    Recomputed activations, curvature samples and the update do not count.

    Args:
      config: of the model.
      rows: sequences.
      length: tokens in a sequence.
    """
    return 3 * rows * length * sum(forward_flops(config, length))
