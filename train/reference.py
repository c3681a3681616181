"""What AdamW reached with the same budget: stored with its command, never written in code."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from train import config
from train.config import Config

PATH = Path(__file__).parent / "references.json"


class Reference(NamedTuple):
    """A stored result of AdamW."""

    command: str  # prints it again
    config_hash: str  # of the run that made it
    bits_per_byte: float
    heldout: list[tuple[int, float]]  # (step, held-out loss in nats)
    stale: bool  # it belongs to another config than the one asked for


def twin(run: Config) -> Config:
    """The same model, data and budget with AdamW at its defaults for that model."""
    return dataclasses.replace(run, optim=config.preset(config.model_name(run), "adamw").optim)


def find(run: Config) -> Reference | None:
    """The stored result for a run's model, or None."""
    stored = json.loads(PATH.read_text()) if PATH.exists() else {}
    fields = stored.get(config.model_name(run))
    if fields is None:
        return None
    return Reference(**fields, stale=fields["config_hash"] != twin(run).hash)


def recompute(run: Config, train: Callable[[Config], list[dict[str, Any]]]) -> None:
    """Trains the twin, in a folder of its own, and stores what it reached."""
    adamw = twin(run)
    apart = dataclasses.replace(run.run, folder="", recompute_reference=False)
    history = train(dataclasses.replace(adamw, run=apart))
    heldout = [(row["step"], row["heldout_loss"]) for row in history if "heldout_loss" in row]
    bits = [row["bits_per_byte"] for row in history if "bits_per_byte" in row][-1]
    stored = json.loads(PATH.read_text()) if PATH.exists() else {}
    stored[config.model_name(run)] = {
        "command": config.command(adamw),
        "config_hash": adamw.hash,
        "bits_per_byte": bits,
        "heldout": heldout,
    }
    PATH.write_text(json.dumps(stored, indent=1) + "\n")
