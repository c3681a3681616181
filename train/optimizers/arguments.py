"""From the fields of a config to the arguments of the library's optimizer of that name."""

import dataclasses
from typing import Any, Literal

from train.optimizers.base import OptimizerConfig, TrainContext
from train.optimizers.layerwise import matrices

StateDtype = Literal["float32", "bfloat16"]


def arguments_of(config: OptimizerConfig, context: TrainContext) -> dict[str, Any]:
    """Arguments named as the fields, with the run's schedule and weight decay on matrices alone."""
    given = {"learning_rate": context.schedule, "weight_decay_mask": matrices}
    return dataclasses.asdict(config) | given
