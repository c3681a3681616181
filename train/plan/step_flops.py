"""FLOPs of a training step by hand, with recomputation and curvature samples."""

import math

import models
from train.config.schema import Config
from train.optimizers.base import SamplingPlan
from train.plan.flops import forward_flops, model_flops


def step_flops(config: Config) -> float:
    """FLOPs of a plain step, recomputation included."""
    tokens = config.batch_size * config.sequence_length
    return model_flops(
        config.model, config.batch_size, config.sequence_length
    ) + tokens * recompute_flops(config)


def recompute_flops(config: Config) -> float:
    """FLOPs per token that the backward pass recomputes under remat or chunked loss.

    A block recomputes all but a decoder's last product, which the backward pass does not read.
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


def curvature_flops(config: Config, sampling: SamplingPlan | None, devices: int = 1) -> float:
    """FLOPs that a curvature sample adds to a plain step. Idle devices count as if they worked.

    A draw of cost "backward" shares the forward pass of the gradient and adds a backward pass; if
    the last round leaves devices idle, it shares nothing. A Hessian-vector product has three
    matrix products for each of the gradient's, if it shares the gradient's pass; apart from it,
    the gradient of the parameters is not computed. A further probe costs its tangents alone. What
    a product recomputes under remat is left out.

    Args:
      config: of the run.
      sampling: how a step samples curvature; None adds nothing.
      devices: over which rows are spread.
    """
    if sampling is None:
        return 0.0
    groups, parallel = sampling.groups, sampling.parallel_groups
    rows = config.batch_size // (config.accumulation * sampling.row_stride * groups)
    filled = sampling.rounds * math.ceil(rows * parallel / devices) * devices
    micro_batches = config.accumulation // sampling.microbatch_stride
    tokens = micro_batches * filled * config.sequence_length
    parameters, attention = forward_flops(config.model, config.sequence_length)
    if sampling.cost == "backward":
        backward = 2 * (parameters + attention) + recompute_flops(config)
        forward = (parameters + attention) * (groups % parallel > 0)
        return tokens * (forward + sampling.draws * backward)
    shared = sampling.row_stride == groups == 1
    first = 6 * (parameters + attention) if shared else 8 * parameters + 9 * attention
    return tokens * (first + (sampling.draws - 1) * 6 * (parameters + attention))
