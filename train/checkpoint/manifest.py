"""The manifest beside the arrays of a checkpoint, and whether a run may go on from it."""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from train.config import serialize
from train.differences import differences
from train.logging.throughput import Health

LIBRARIES = ("jax", "jaxlib", "optax", "orbax-checkpoint", "flax", "numpy")
FREE = ("output", "mesh", "steps", "base")
"""Fields of a config that may differ on resume: where it runs, what it writes, how long."""
PLACES = ("source", "heldout_source", "tokenizer", "cache", "download", "tfds_folder")
"""Fields of its data that may differ: the fingerprint says whether it is the same data."""
NOTED = ("warmup_steps",)
"""Fields that may differ, with a note for the user; `resume --warmup-steps` changes it."""


def make(step: int, config: Mapping[str, Any], fingerprint: str, health: Health) -> dict[str, Any]:
    """The manifest of a state, in plain JSON values.

    Args:
      step: steps done, which is the data's position too.
      config: of `serialize.to_json`.
      fingerprint: of data and tokenizer.
      health: what the host knows about the steps before.
    """
    return {
        "step": step,
        "config": dict(config),
        "fingerprint": fingerprint,
        "versions": versions(),
        "health": health._asdict(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a step computes."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in LIBRARIES
    }


def health(manifest: Mapping[str, Any]) -> Health:
    """The health in a manifest; older versions call `refresh_pending` "owed".

    >>> health({"health": {"skipped": 2, "in_a_row": 1, "owed": True}})
    Health(skipped=2, in_a_row=1, refresh_pending=True, renew_pending=False)
    """
    fields: Mapping[str, Any] = manifest.get("health", {})
    return Health(
        skipped=int(fields.get("skipped", 0)),
        in_a_row=int(fields.get("in_a_row", 0)),
        refresh_pending=bool(fields.get("refresh_pending", fields.get("owed", False))),
        renew_pending=bool(fields.get("renew_pending", False)),
    )


def check(
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    fingerprint: str,
    *,
    allow_changes: bool = False,
) -> list[str]:
    """Compares a run that goes on with the manifest of its checkpoint.

    Args:
      manifest: of `make`; empty if the checkpoint has none.
      config: of the run that goes on.
      fingerprint: of its data.
      allow_changes: report differences instead of raising.

    Returns:
      Notes for the user.

    Raises:
      ValueError: config or data differ from the checkpoint.
    """
    if not manifest:
        return ["the checkpoint does not say which config it was saved with: not compared"]
    before, now = (_fixed(c) for c in (serialize.renamed(manifest["config"]), config))
    changed = differences(before, now)
    wrong = [line for line in changed if not line.startswith(NOTED)]
    if manifest["fingerprint"] != fingerprint:
        wrong.append(f"data {manifest['fingerprint'] or 'unknown'} -> {fingerprint or 'unknown'}")
    if wrong and not allow_changes:
        raise ValueError(
            f"the run's config or data are not those of its checkpoint of step {manifest['step']}: "
            f"{'; '.join(wrong)}. Put back what was changed, or go on with --allow-changes."
        )
    notes = [f"changed since the checkpoint: {line}" for line in dict.fromkeys(changed + wrong)]
    newer = differences(manifest["versions"], versions())
    return notes + [f"another version since the checkpoint: {line}" for line in newer]


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in config.items() if name not in FREE}
    data = dict(fields.get("data", {}))
    return fields | {"data": {name: value for name, value in data.items() if name not in PLACES}}
