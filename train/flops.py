"""Operations of a training step by hand: products of matrices alone, a multiply-add is two."""

import models
from train.config import Config
from train.sophia import SophiaG, SophiaH

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


def step_flops(run: Config) -> float:
    """Of a plain step: what it computes again counts too."""
    tokens = run.batch_size * run.sequence_length
    return model_flops(run.model, run.batch_size, run.sequence_length) + tokens * _again(run)


def _again(run: Config) -> float:
    """Of a token: what a way back computes that the way forward did, logits held in chunks too."""
    parameters, attention = forward_flops(run.model, run.sequence_length)
    head = 0.0
    if run.loss_chunk and not (isinstance(run.model, models.EncoderConfig) and run.model.classes):
        head = 2.0 * run.model.width * run.model.padded_vocab
    blocks = {"none": 0.0, "dots": attention, "full": parameters + attention - head}
    return head + blocks[run.model.remat]


def curvature_flops(run: Config) -> float:
    """What a sample of curvature adds to a plain step.

    Gauss-Newton-Bartlett shares its forward pass: a backward pass for each draw. Hutchinson's
    product has three products for each of the gradient's where the gradient is wanted too; apart,
    the gradient of parameters itself is not computed. A further probe costs the tangents alone.
    What Hutchinson computes again is left out.
    """
    if not isinstance(run.optim, SophiaG | SophiaH):
        return 0.0
    every, stride = run.optim.strides(run.batch_size, run.accumulation)
    tokens = run.batch_size * run.sequence_length / (every * stride)
    parameters, attention = forward_flops(run.model, run.sequence_length)
    if isinstance(run.optim, SophiaG):
        return tokens * run.optim.num_samples * (2 * (parameters + attention) + _again(run))
    shared = stride == 1 and run.optim.groups_of(run.batch_size, run.accumulation) == 1
    first = 6 * (parameters + attention) if shared else 8 * parameters + 9 * attention
    return tokens * (first + (run.optim.num_samples - 1) * 6 * (parameters + attention))
