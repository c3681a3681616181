"""What stands beside the arrays of a checkpoint, and whether a run may go on from it."""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

LIBRARIES = ("jax", "jaxlib", "optax", "orbax-checkpoint", "flax", "numpy")
FREE = ("run", "output", "mesh", "steps", "base")
"""Fields of a config that may differ on resume: where it runs, what it writes, how long."""
PLACES = ("source", "heldout_source", "tokenizer", "cache", "download", "tfds_folder")
"""Fields of its data that may: whether it is the same data the fingerprint says."""
TOLD = ("warmup_steps",)
"""Fields that may, and of which is told; --warmup-steps of `resume` changes it."""


def make(step: int, config: Mapping[str, Any], fingerprint: str, health: Any) -> dict[str, Any]:
    """Plain JSON values; `step` is the data's position too, which is a function of it.

    Args:
      step: steps done.
      config: as of `config.to_json`.
      fingerprint: of data and tokenizer.
      health: a NamedTuple of numbers, what the host must know of the steps before.
    """
    return {
        "step": step,
        "config": dict(config),
        "fingerprint": fingerprint,
        "versions": versions(),
        "health": health._asdict(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide what a step computes."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in LIBRARIES
    }


def check(
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    fingerprint: str,
    *,
    allow_changes: bool = False,
) -> list[str]:
    """What to tell about a run that goes on from a checkpoint.

    Args:
      saved: of `make`; empty if the checkpoint has none.
      config: of the run that goes on.
      fingerprint: of its data.
      allow_changes: report differences instead of raising.

    Raises:
      ValueError: config or data are not those of the checkpoint.
    """
    if not saved:
        return ["the checkpoint does not say which config it was saved with: not compared"]
    before, now = (_fixed(c) for c in (saved["config"], config))
    changed = differences(before, now)
    wrong = [line for line in changed if not line.startswith(TOLD)]
    if saved["fingerprint"] != fingerprint:
        wrong.append(f"data {saved['fingerprint'] or 'unknown'} -> {fingerprint or 'unknown'}")
    if wrong and not allow_changes:
        raise ValueError(
            f"the run's config or data are not those of its checkpoint of step {saved['step']}: "
            f"{'; '.join(wrong)}. Put back what was changed, or go on with --allow-changes."
        )
    notes = [f"changed since the checkpoint: {line}" for line in dict.fromkeys(changed + wrong)]
    newer = differences(saved["versions"], versions())
    return notes + [f"another version since the checkpoint: {line}" for line in newer]


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in config.items() if name not in FREE}
    data = dict(fields.get("data", {}))
    return fields | {"data": {name: value for name, value in data.items() if name not in PLACES}}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines "name old -> new"; a field that only one of them has came or went with the code.

    >>> differences({"optim": {"gamma": 0.1, "eps": 1}}, {"optim": {"gamma": 0.2, "eps": 1}})
    ['optim.gamma 0.1 -> 0.2']
    """
    old, new = _flat(before), _flat(now)
    return [f"{k} {old[k]} -> {new[k]}" for k in old if k in new and old[k] != new[k]]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
