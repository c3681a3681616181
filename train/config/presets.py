"""Hyperparameters for each pair of a model and an optimizer, and where they come from.

Published: Liu et al. 2023 for Sophia-G, Sophia-H and AdamW at 125m, 355m and 770m, Zhao et al. 2024
for GaLore's rate, scale and ranks (Llamas of 60m to 1b). Measured: LOG.md has the runs. All else is
a guess, from a neighbouring size or from the optimizer's kin; so is the weight decay of .1 of those
whose paper has none, for the sake of equal terms.
"""

import dataclasses
import difflib
from typing import Any

from models import PRESETS, EncoderConfig
from train.config.output import OutputConfig
from train.config.schema import Config
from train.config.sizes import GPT2_SIZE
from train.data.config import DataConfig
from train.optimizers.adafactor import Adafactor
from train.optimizers.adam import Adam, AdamW
from train.optimizers.base import OptimizerConfig
from train.optimizers.galore import GaLore
from train.optimizers.lion import Lion
from train.optimizers.muon import Muon
from train.optimizers.orthosoph import OrthoSoph
from train.optimizers.registry import OPTIMIZERS
from train.optimizers.sgd import Sgd
from train.optimizers.sm3 import Sm3
from train.optimizers.soaa import Soaa
from train.optimizers.sophia import SophiaG, SophiaH
from train.optimizers.sophia_geometric import SophiaGeometric
from train.optimizers.sophia_lite import SophiaLite


def _at(rate: float, gamma: float, adamw_rate: float, rank: int) -> dict[str, OptimizerConfig]:
    return {
        "sophia-g": SophiaG(  # published, where the sample is half the rows, squared at once
            learning_rate=rate, gamma=gamma, weight_decay=0.2, batch_fraction=1 / 10, groups=0
        ),
        "sophia-h": SophiaH(  # published, 32 of 480 rows too, but with one probe for all
            learning_rate=rate, weight_decay=0.2, batch_fraction=1 / 15, groups=4
        ),
        "sophia-lite": SophiaLite(learning_rate=adamw_rate),  # guess
        "sophia-geometric": SophiaGeometric(learning_rate=adamw_rate / 4),  # guess: Lion's
        "orthosoph": OrthoSoph(learning_rate=adamw_rate),  # guess
        "soaa": Soaa(learning_rate=adamw_rate),  # guess
        "adamw": AdamW(learning_rate=adamw_rate),  # published
        "adam": Adam(learning_rate=adamw_rate),  # guess
        "lion": Lion(learning_rate=adamw_rate / 4),  # guess; b1 and b2 published by Liu et al.
        "sm3": Sm3(),  # guess
        "adafactor": Adafactor(),  # its paper's largest relative step
        "muon": Muon(learning_rate=adamw_rate),  # guess
        "galore": GaLore(rank=rank),  # published for Llamas
        "sgd": Sgd(),  # guess
    }


# Sophia's rate, Sophia-G's gamma, AdamW's rate, GaLore's rank
_OF_SIZE: dict[str, dict[str, OptimizerConfig]] = {
    "30m": _at(6e-4, 0.05, 6e-4, 128),  # 125m's; the rank published for a Llama of 60m
    "125m": _at(6e-4, 0.05, 6e-4, 256),  # published
    "355m": _at(7e-4, 0.08, 3e-4, 256),  # published
    "540m": _at(3e-4, 0.05, 2e-4, 512),  # 770m's
    "770m": _at(3e-4, 0.05, 2e-4, 512),  # published; the rank that of a Llama of 1b
}
LARGE: dict[str, dict[str, OptimizerConfig]] = {
    name: _OF_SIZE[size] for name, size in GPT2_SIZE.items()
}
"""Every model that is no tiny one."""

# At 1,200 steps of 16 x 64 bytes, where long momentum hurts sign-like steps.
TINY: dict[str, OptimizerConfig] = {
    "sophia-g": SophiaG(learning_rate=3e-3, b1=0.8, b2=0.9, gamma=0.1, groups=0),  # measured
    "sophia-h": SophiaH(learning_rate=3e-3, b1=0.8, b2=0.9, gamma=0.02, groups=0),  # measured
    "sophia-lite": SophiaLite(learning_rate=2.5e-3, b1=0.8),  # measured at 400 steps
    "sophia-geometric": SophiaGeometric(learning_rate=2e-3, b1=0.8),  # measured at 400 steps
    "orthosoph": OrthoSoph(learning_rate=2e-2),  # measured; one block of 64 rows a matrix
    "soaa": Soaa(learning_rate=5e-3, b1=0.8),  # measured at 400 steps
    "adamw": AdamW(learning_rate=1e-2, b1=0.8),  # measured
    "adam": Adam(learning_rate=1e-2, b1=0.8),  # guess: AdamW's
    "lion": Lion(learning_rate=3e-4, b1=0.8, b2=0.9),  # measured
    "sm3": Sm3(),  # guess
    "adafactor": Adafactor(learning_rate=0.1, min_dim_size_to_factor=32),  # guess
    "muon": Muon(learning_rate=2e-2),  # measured
    "galore": GaLore(learning_rate=2e-2, rank=16),  # guess
    "sgd": Sgd(learning_rate=0.3),  # guess
}


def preset(model: str = "tiny", optimizer: str = "sophia-g") -> Config:
    """The default run of a model and an optimizer.

    Args:
      model: a name in `models.PRESETS`.
      optimizer: a name in `OPTIMIZERS`.

    Returns:
      Its config: the published one for GPT-2 sizes, a two-minute one for tiny ones.
      `train.config.presets` says which hyperparameters are published, measured or guesses.

    Raises:
      ValueError: an unknown name; the message suggests the nearest.

    >>> preset("tiny", "adamw").optim.learning_rate
    0.01
    """
    _known(model, PRESETS, "model", ("resume",))
    _known(optimizer, OPTIMIZERS, "optimizer")
    shape = PRESETS[model]
    data = DataConfig(task="masked" if isinstance(shape, EncoderConfig) else "next-token")
    tuned = LARGE.get(model, TINY).get(optimizer) or OPTIMIZERS[optimizer]()
    if model not in LARGE:  # a tiny one: a test holds that there are no others
        return Config(shape, tuned, data, base=model)
    return Config(
        dataclasses.replace(shape, scan_layers=True),
        tuned,
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
