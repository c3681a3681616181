"""Values that no config may hold."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

import numpy as np

from models import DecoderConfig, EncoderConfig

T = TypeVar("T")

NOT_NEGATIVE = ("eps", "weight_decay", "momentum", "gamma", "rank", "scale", "block_size", "seed")
MOST_SAMPLES = 1024
"""Draws of all labels in one sample of curvature; each costs a backward pass."""


def check_numbers(fields: dict[str, Any], flag: str) -> None:
    """Rejects non-finite and impossible numbers.

    Otherwise training yields NaN and the learning rate gets the blame.

    Args:
      fields: of a config, nested.
      flag: beginning of the flags of these fields, for messages.

    Raises:
      ValueError: names the flag and the cure.
    """
    for name, value in fields.items():
        shown = flag + name.replace("_", "-")
        if isinstance(value, dict):
            check_numbers(value, f"{shown}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{shown} {value} is not a finite number.")
        elif name == "learning_rate" and value < 0:
            raise ValueError(f"{shown} {value} is negative, which climbs the loss.")
        elif name in NOT_NEGATIVE and value < 0:
            raise ValueError(f"{shown} {value} is negative: choose 0 or more.")
        elif (name == "b1" and not 0 <= value < 1) or (name == "b2" and not 0 <= value <= 1):
            raise ValueError(
                f"{shown} {value} is not a valid decay: choose at least 0 and less than 1."
            )
        elif name in ("b1", "b2") and value < 1 and np.float32(value) == 1:
            raise ValueError(f"{shown} {value} is 1 in float32: choose at most 0.9999999.")
        elif name == "num_samples" and value > MOST_SAMPLES:
            raise ValueError(f"{shown} {value} is too often: choose at most {MOST_SAMPLES}.")


def check_task(task: str, model: DecoderConfig | EncoderConfig) -> None:
    """Raises ValueError if the model has no output for the task."""
    classes = getattr(model, "classes", 0)
    encoder = isinstance(model, EncoderConfig)
    if encoder != (task != "next-token") or (task == "classify") != bool(classes):
        kind = f"an encoder for {classes} classes" if classes else "an encoder" * encoder
        raise ValueError(
            f"data.task={task} does not suit {kind or 'a decoder'}: a decoder predicts the next "
            "token, an encoder masked tokens (--data.task masked), an encoder with --model.classes "
            "above 0 classes (--data.task classify)."
        )


def make(kind: type[T], fields: Mapping[str, Any], name: str = "") -> T:
    """A dataclass from plain JSON values.

    Args:
      kind: the dataclass.
      fields: values; nested dataclasses are made already.
      name: prefix of the field names in messages.

    Raises:
      TypeError, AttributeError, ValueError: a field is unknown, or not of its type.
    """
    kinds = typing.get_type_hints(kind)
    for field, value in fields.items():
        if dataclasses.is_dataclass(value) or field not in kinds:
            continue
        if not _fits(value, kinds[field]):
            raise TypeError(f"{name}{field} is {value!r:.40}, which is not of the right type")
    return kind(**fields)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the type of a field."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, (list, tuple) if origin is tuple else origin or kind)
