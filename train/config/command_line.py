"""Command lines to paste: for a config, and for commands on a run."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from train.config.output import OutputConfig
from train.config.presets import preset
from train.config.schema import Config
from train.optimizers.registry import name_of


def python() -> str:
    """The interpreter, relative to the working directory if it lies inside."""
    running, here = Path(sys.executable), Path.cwd()
    return str(running.relative_to(here)) if running.is_relative_to(here) else "python"


def call(*words: object) -> str:
    """A command line to paste, with its paths quoted.

    >>> call("resume", Path("my runs/a")).partition(" ")[2]
    "-m train resume 'my runs/a'"
    """
    return shlex.join([python(), "-m", "train", *map(str, words)])


def command(config: Config) -> str:
    """The command line of a run: its preset, and a flag for each field that differs.

    >>> command(dataclasses.replace(preset("tiny", "adamw"), steps=500))
    'python -m train tiny adamw --steps 500'
    """
    names = (config.base, name_of(config.optim))
    return " ".join(["python -m train", *names, *_flags(config, preset(*names))])


def differing(value: Any, default: Any) -> list[tuple[str, Any]]:
    """(name, value) of the fields of a dataclass that differ from another's."""
    pairs = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [(name, new) for name, new in pairs if new != getattr(default, name)]


def _flags(value: Any, default: Any, prefix: str = "--") -> list[str]:
    flags = []
    for field, new in differing(value, default):
        name = prefix + field.replace("_", "-")
        if isinstance(new, OutputConfig) or field == "base":
            continue
        if dataclasses.is_dataclass(new):
            flags += _flags(new, getattr(default, field), name + ".")
        elif isinstance(new, bool):
            head, _, tail = name.rpartition(".")
            flags.append(name if new else f"{head}.no-{tail}" if head else f"--no-{tail[2:]}")
        else:
            flags.append(f"{name} {shlex.quote(str(new))}")
    return flags
