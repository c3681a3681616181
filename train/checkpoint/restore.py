"""Where a run that is resumed begins: at a checkpoint that can be read, or at step 0 again."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models import reading
from train import program
from train.checkpoint import manifest, policy, store
from train.config import serialize
from train.config.schema import Config
from train.logging import jsonl
from train.logging.throughput import Health
from train.parallel import processes
from train.step.train_step import TrainState


class Start(NamedTuple):
    """Where a run begins."""

    state: TrainState
    health: Health = Health()
    notes: tuple[str, ...] = ()


def restored(
    config: Config,
    folder: Path,
    programs: program.Program,
    checkpoints: store.Checkpoints,
    initial: Callable[[], TrainState],
    *,
    step: int | None,
    allow_changes: bool,
) -> Start:
    """The state to go on from, and what to say about it.

    Args:
      config: the config that goes on.
      folder: of the run.
      programs: of `config`.
      checkpoints: in `folder`.
      initial: makes the state of step 0.
      step: of a checkpoint; default the newest that can be read.
      allow_changes: go on although config or data are not those of the checkpoint.

    Raises:
      ValueError, CheckpointError: as in `loop.resume`.
    """
    notes: list[str] = []

    def accept(saved: Any) -> None:
        now, fingerprint = serialize.to_json(config), programs.data().fingerprint
        with reading.fields_of(f"the record of a checkpoint in {checkpoints.directory}"):
            notes[:] = manifest.check(saved, now, fingerprint, allow_changes=allow_changes)

    processes.on_main(checkpoints.repair)
    if step is None:
        again = processes.on_main(lambda: _begin_again(config, folder, checkpoints))
        if said := processes.from_main(again or ""):
            return Start(initial(), notes=(said,))
    _verify(checkpoints, step)
    done, state = processes.on_all(
        lambda: checkpoints.restore(
            programs.abstract,
            step,
            accept=accept,
            wrong=policy.wrong_here,
        )
    )
    processes.check_same(
        {"checkpoint": done},
        "Some cannot read the newest: see that all can, or name an older one with --step.",
    )
    if config.steps < done:
        raise ValueError(
            f"steps={config.steps} is less than the {done} that the checkpoint has done: ask for "
            "more, or start from an older one with --step."
        )
    health = _health(checkpoints)
    notes = [*checkpoints.notes, *notes]
    if step is not None and (later := checkpoints.abandon_later()):
        notes.append(f"going on from step {step}: the later checkpoints, {later}, are deleted")
    if done == config.steps:
        notes.append(f"step {done} was the last: nothing is left to train")
    return Start(state, health, tuple(notes))


def _verify(checkpoints: store.Checkpoints, step: int | None) -> None:
    """One process reads all files, and all go by what it found."""
    faults = processes.on_main(lambda: checkpoints.verify(step)) or {}
    pairs = json.loads(processes.from_main(json.dumps(list(faults.items()))))
    checkpoints.faults.update(pairs)


def _health(checkpoints: store.Checkpoints) -> Health:
    with reading.fields_of(f"the record of a checkpoint in {checkpoints.directory}"):
        fields: Mapping[str, Any] = checkpoints.record.get("health", {})
        return Health(
            skipped=int(fields.get("skipped", 0)),
            in_a_row=int(fields.get("in_a_row", 0)),
            owed=bool(fields.get("owed", False)),
        )


def _begin_again(config: Config, folder: Path, checkpoints: store.Checkpoints) -> str:
    """Clears the way for a run that was killed before its first checkpoint, and says so.

    Its metrics are kept under another name: should the checkpoints have been deleted, they are all
    that is left. Says nothing where there is a checkpoint, or there must have been one: the second
    save waits for the end of the first, and metrics are written before both.
    """
    if checkpoints.directory.is_dir() and any(checkpoints.directory.iterdir()):
        return ""
    path, said = folder / jsonl.FILE, "no checkpoint yet: starting from step 0"
    rows = jsonl.read_history(folder) if path.exists() else []
    if not rows:
        return said
    if max(row["step"] for row in rows) > 2 * config.output.checkpoint_every:
        return ""
    aside = path.with_name(f"metrics-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
    path.rename(aside)
    return f"{said}; the metrics up to step {rows[-1]['step']} are now in {aside}"
