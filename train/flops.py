"""Operations of a model by hand: products of matrices alone, a multiply-add is two."""

import models

Model = models.DecoderConfig | models.EncoderConfig
# Dense bfloat16 TFLOP/s of data sheets, by part of `device_kind`; the first that fits.
PEAKS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "TPU v6": 918.0,
    "TPU v5p": 459.0,
    "TPU v5": 197.0,
    "TPU v4": 275.0,
}


def peak_flops(kind: str, given: float | None = None) -> float | None:
    """Operations a second that a device could do, None if nobody has told.

    Args:
      kind: its `device_kind`.
      given: TFLOP/s, instead of what is known.

    >>> peak_flops("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    """
    known = (value for name, value in PEAKS.items() if name in kind)
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
