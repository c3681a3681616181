"""The default run of a model and an optimizer."""

import dataclasses
import difflib
from typing import Any

from models import PRESETS, EncoderConfig
from train.config.output import OutputConfig
from train.config.schema import Config
from train.config.sizes import GPT2_SIZE
from train.data.config import DataConfig
from train.optimizers.registry import OPTIMIZERS
from train.optimizers.tuned import tuned


def preset(model: str = "tiny", optimizer: str = "sophia-g") -> Config:
    """The default run of a model and an optimizer.

    Args:
      model: a name in `models.PRESETS`.
      optimizer: a name in `OPTIMIZERS`.

    Returns:
      Its config: the published one for GPT-2 sizes, a two-minute one for tiny ones.
      `train.optimizers.tuned` says which hyperparameters are published, measured or guessed.

    Raises:
      ValueError: an unknown name; the message suggests the nearest.

    >>> preset("tiny", "adamw").optim.learning_rate
    0.01
    """
    _known(model, PRESETS, "model", ("resume",))
    _known(optimizer, OPTIMIZERS, "optimizer")
    shape = PRESETS[model]
    data = DataConfig(task="masked" if isinstance(shape, EncoderConfig) else "next-token")
    optim = tuned(optimizer, GPT2_SIZE.get(model, ""))
    if model not in GPT2_SIZE:  # a tiny one: a test holds that there are no others
        return Config(shape, optim, data, base=model)
    return Config(
        dataclasses.replace(shape, scan_layers=True),
        optim,
        data,
        base=model,
        output=OutputConfig(checkpoint_every=1000),
        steps=100_000,
        batch_size=480,
        sequence_length=min(1024, shape.context),
        loss_chunk=128,
        evaluate_every=1000,
    )


def _known(name: str, table: dict[str, Any], kind: str, commands: tuple[str, ...] = ()) -> None:
    if name not in table:
        words = [*table, *commands]
        # Reversed, so that the first of a family stands for it.
        forms = {form: word for word in words[::-1] for form in (word, word.partition("-")[0])}
        near = [word for word in words if word.startswith(name)]
        near += [forms[form] for form in difflib.get_close_matches(name, forms, cutoff=0.4)]
        hint = f" Did you mean {near[0]}?" if near else ""
        if kind == "model" and name in OPTIMIZERS:
            hint = f" That is an optimizer: name the model before it, such as tiny {name}."
        raise ValueError(f"unknown {kind} {name!r}.{hint} There are: {', '.join(table)}.")
