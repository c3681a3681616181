"""Operations of a step of a run by hand: what is computed again, and what curvature adds."""

import math

import models
from train.config.schema import Config
from train.optimizers.sophia import SophiaG, SophiaH
from train.plan.flops import forward_flops, model_flops


def step_flops(config: Config) -> float:
    """Of a plain step: what it computes again counts too."""
    tokens = config.batch_size * config.sequence_length
    return model_flops(config.model, config.batch_size, config.sequence_length) + tokens * _again(
        config
    )


def _again(config: Config) -> float:
    """Of a token: what a way back computes that the way forward did, logits held in chunks too.

    Of a block all but a decoder's last product, which nothing on the way back reads.
    """
    model, (parameters, attention) = (
        config.model,
        forward_flops(config.model, config.sequence_length),
    )
    encoder = isinstance(model, models.EncoderConfig)
    head = 0.0 if encoder and model.classes else 2.0 * model.width * model.padded_vocab
    hidden = model.ffn_width or 4 * model.width
    last = 0.0 if encoder else 2.0 * model.layers * model.width * hidden
    blocks = {"none": 0.0, "dots": attention, "full": parameters + attention - head - last}
    return blocks[model.remat] + head * (config.loss_chunk > 0)


def curvature_flops(config: Config, devices: int = 1) -> float:
    """What a sample of curvature adds to a plain step, with rows over so many devices.

    Gauss-Newton-Bartlett shares its forward pass: a backward pass for each draw. Where groups side
    by side leave devices idle it does not. Devices that wait count as if they worked. Hutchinson's
    product has three products for each of the gradient's where the gradient is wanted too; apart,
    the gradient of parameters itself is not computed. A further probe costs the tangents alone.
    What Hutchinson computes again is left out.
    """
    if not isinstance(config.optim, SophiaG | SophiaH):
        return 0.0
    size = config.batch_size, config.accumulation
    every, stride = config.optim.strides(*size)
    groups, shards = config.optim.groups_of(*size), config.optim.shards(devices, *size)
    rows = config.batch_size // (config.accumulation * stride * groups)
    filled = math.ceil(groups / shards) * math.ceil(rows * shards / devices) * devices
    tokens = config.accumulation // every * filled * config.sequence_length
    parameters, attention = forward_flops(config.model, config.sequence_length)
    if isinstance(config.optim, SophiaG):
        pass_back = 2 * (parameters + attention) + _again(config)
        forward = (parameters + attention) * (groups % shards > 0)
        return tokens * (forward + config.optim.num_samples * pass_back)
    shared = stride == groups == 1
    first = 6 * (parameters + attention) if shared else 8 * parameters + 9 * attention
    return tokens * (first + (config.optim.num_samples - 1) * 6 * (parameters + attention))
