"""Operations of a step of a run by hand: what is computed again, and what curvature adds."""

import math

import models
from train.config.schema import Config
from train.optimizers.sophia import SophiaG, SophiaH
from train.plan.flops import forward_flops, model_flops


def step_flops(run: Config) -> float:
    """Of a plain step: what it computes again counts too."""
    tokens = run.batch_size * run.sequence_length
    return model_flops(run.model, run.batch_size, run.sequence_length) + tokens * _again(run)


def _again(run: Config) -> float:
    """Of a token: what a way back computes that the way forward did, logits held in chunks too.

    Of a block all but a decoder's last product, which nothing on the way back reads.
    """
    config, (parameters, attention) = run.model, forward_flops(run.model, run.sequence_length)
    encoder = isinstance(config, models.EncoderConfig)
    head = 0.0 if encoder and config.classes else 2.0 * config.width * config.padded_vocab
    hidden = config.ffn_width or 4 * config.width
    last = 0.0 if encoder else 2.0 * config.layers * config.width * hidden
    blocks = {"none": 0.0, "dots": attention, "full": parameters + attention - head - last}
    return blocks[config.remat] + head * (run.loss_chunk > 0)


def curvature_flops(run: Config, devices: int = 1) -> float:
    """What a sample of curvature adds to a plain step, with rows over so many devices.

    Gauss-Newton-Bartlett shares its forward pass: a backward pass for each draw. Where groups side
    by side leave devices idle it does not. Devices that wait count as if they worked. Hutchinson's
    product has three products for each of the gradient's where the gradient is wanted too; apart,
    the gradient of parameters itself is not computed. A further probe costs the tangents alone.
    What Hutchinson computes again is left out.
    """
    if not isinstance(run.optim, SophiaG | SophiaH):
        return 0.0
    size = run.batch_size, run.accumulation
    every, stride = run.optim.strides(*size)
    groups, shards = run.optim.groups_of(*size), run.optim.shards(devices, *size)
    rows = run.batch_size // (run.accumulation * stride * groups)
    filled = math.ceil(groups / shards) * math.ceil(rows * shards / devices) * devices
    tokens = run.accumulation // every * filled * run.sequence_length
    parameters, attention = forward_flops(run.model, run.sequence_length)
    if isinstance(run.optim, SophiaG):
        pass_back = 2 * (parameters + attention) + _again(run)
        forward = (parameters + attention) * (groups % shards > 0)
        return tokens * (forward + run.optim.num_samples * pass_back)
    shared = stride == groups == 1
    first = 6 * (parameters + attention) if shared else 8 * parameters + 9 * attention
    return tokens * (first + (run.optim.num_samples - 1) * 6 * (parameters + attention))
