"""The stored results of AdamW with the same budget, each with the command that repeats it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from models import reading
from train import files
from train.config import command_line, presets
from train.config.schema import Config
from train.parallel import processes

SHIPPED = Path(__file__).parent / "references.json"
"""Part of the source; a run never writes to it."""
OWN = Path("~/.cache/sophia_optax/references.json")
"""Where `recompute` stores results; they take precedence over `SHIPPED`."""


class Reference(NamedTuple):
    """A stored result of AdamW."""

    model: str
    command: str  # repeats it
    bits_per_byte: float | None  # only for next-token prediction of a whole text
    heldout: list[tuple[int, float]]  # (step, held-out loss in nats)
    stale: bool  # it belongs to another config of the same model


def twin(config: Config) -> Config:
    """The same model, data and budget, with AdamW at its defaults for that model.

    Without accumulation, which changes nothing but rounding.
    """
    return dataclasses.replace(
        config, optim=presets.preset(config.base, "adamw").optim, accumulation=1
    )


def is_twin(config: Config) -> bool:
    """Whether a run is its own baseline."""
    return dataclasses.replace(config, accumulation=1).hash == twin(config).hash


def find(config: Config) -> Reference | None:
    """The stored result for a run's budget, else a stale one for its model, else None.

    Raises:
      ValueError: `OWN` cannot be read.
    """
    stored, wanted = _stored(), twin(config).hash
    with reading.fields_of(OWN):
        if wanted in stored:
            return Reference(**stored[wanted], stale=False)
        others = [fields for fields in stored.values() if fields["model"] == config.base]
        return Reference(**others[-1], stale=True) if others else None


def recompute(
    config: Config, folder: Path, train: Callable[[Config], list[dict[str, Any]]]
) -> None:
    """Trains the twin in a folder beside the run's, and stores its result."""
    adamw, beside = twin(config), f"{folder}-reference"
    apart = dataclasses.replace(config.output, folder=beside, recompute_reference=False)
    history = train(dataclasses.replace(adamw, output=apart))
    processes.on_main(lambda: _store(adamw, history))  # only process 0 has the history


def _store(adamw: Config, history: list[dict[str, Any]]) -> None:
    evaluated = [row for row in history if "heldout_loss" in row]
    fields = {
        "model": adamw.base,
        "command": command_line.command(adamw),
        "bits_per_byte": evaluated[-1].get("bits_per_byte"),
        "heldout": [(row["step"], row["heldout_loss"]) for row in evaluated],
    }
    own = OWN.expanduser()
    own.parent.mkdir(parents=True, exist_ok=True)
    files.replace_text(own, json.dumps(_read(own) | {adamw.hash: fields}, indent=1) + "\n")


def _stored() -> dict[str, dict[str, Any]]:
    """Config hash -> fields of a `Reference`."""
    return _read(SHIPPED) | _read(OWN.expanduser())


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return reading.read_json(path) if path.exists() else {}
