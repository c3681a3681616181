"""Operations of a model by hand: products of matrices alone, a multiply-add is two."""

import re

import models

Model = models.DecoderConfig | models.EncoderConfig
# Dense bfloat16 TFLOP/s of one JAX device, and how its `device_kind` reads; the first that fits.
# NVIDIA's data sheets, where figures "with sparsity" are twice as large; for TPUs the tables of
# docs.cloud.google.com/tpu/docs and the names of jax._src.tpu_info.
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
    """Operations a second that a device could do, None if nobody has told.

    Args:
      kind: its `device_kind`.
      given: TFLOP/s, instead of what is known.

    >>> peak_flops("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    >>> peak_flops("TPU v5 lite"), peak_flops("TPU v5")
    (197000000000000.0, 459000000000000.0)
    """
    known = (peak for peak, reads in _CHIPS.values() if re.search(rf"\b({reads})(?!\w)", kind))
    teraflops = given or next(known, None)
    return teraflops and 1e12 * teraflops


def forward_flops(config: Model, length: int) -> tuple[float, float]:
    """Of a token of a sequence of `length`: (products with parameters, those of attention).

    Attention masks half of its T x T scores and computes all. A head of classes reads one token of
    a sequence, which is left out.

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
    """Of loss and gradient: each product forward, and two backward; what MFU is a share of.

    What a step computes beyond that (recomputed activations, samples of curvature, the update)
    does not count as use of the hardware.
    """
    return 3 * rows * length * sum(forward_flops(config, length))
