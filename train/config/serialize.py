"""A config as JSON, and in the folder of a run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import PRESETS, reading
from train import files
from train.config import checks
from train.config.output import OutputConfig
from train.config.schema import Config
from train.data.config import DataConfig
from train.optimizers.registry import OPTIMIZERS, name_of
from train.parallel.mesh import MeshConfig

RENAMED = {"run": "output"}
"""Fields of a config by the names that older versions saved."""
RENAMED_OPTIM = {"spread": "amortize", "b2_numbers": "b2_vector"}
"""Fields of an optimizer by the names that older versions saved."""


def to_json(config: Config) -> dict[str, Any]:
    """The config as plain JSON values, with the optimizer's name."""
    return {**dataclasses.asdict(config), "optimizer": name_of(config.optim)}


def renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a config with today's field names.

    >>> renamed({"run": {}, "optim": {"spread": True}})
    {'output': {}, 'optim': {'amortize': True}}
    """
    fields = {RENAMED.get(name, name): value for name, value in fields.items()}
    if isinstance(optim := fields.get("optim"), Mapping):
        fields["optim"] = {RENAMED_OPTIM.get(name, name): x for name, x in optim.items()}
    return fields


def from_json(fields: dict[str, Any]) -> Config:
    """The inverse of `to_json`.

    Raises:
      KeyError, TypeError, AttributeError, ValueError: a field is missing, unknown or of another
        type.

    >>> from train.config.presets import preset
    >>> from_json(to_json(preset())) == preset()
    True
    """
    fields = renamed(fields)
    kinds = {
        "model": type(PRESETS[fields["base"]]),
        "optim": OPTIMIZERS[fields.pop("optimizer")],
        "data": DataConfig,
        "mesh": MeshConfig,
        "output": OutputConfig,
    }
    made = {name: checks.make(kind, fields[name], f"{name}.") for name, kind in kinds.items()}
    return checks.make(Config, fields | made)


def save(config: Config, folder: Path) -> None:
    """Writes `config.json` into a run's folder."""
    files.replace_text(folder / "config.json", json.dumps(to_json(config), indent=1) + "\n")


def load(folder: Path) -> Config:
    """The config of a run.

    Raises:
      ValueError: the folder is missing, holds no run, or its `config.json` cannot be read.
    """
    files.check_local(folder, "the run")
    path = folder / "config.json"
    if not path.is_file():
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"{folder} {what}: give the folder of a run, such as runs/tiny-sophia-g-..., which "
            "the last line of that run named."
        )
    cure = "It was edited, cut short, or written by another version; restore it from a copy."
    fields = reading.read_json(path)
    try:
        config = from_json(fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read as a run's config ({what}). {cure}") from error
    return dataclasses.replace(config, data=config.data.in_run(folder))
