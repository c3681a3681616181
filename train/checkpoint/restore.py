"""Where a resumed run begins: at a checkpoint that can be read, or at step 0 again."""

import json
import time
from pathlib import Path
from typing import Any

from models import reading
from train.checkpoint import manifest, start, validate
from train.checkpoint.run_folder import Run
from train.checkpoint.start import Start
from train.checkpoint.store import Checkpoints
from train.config import serialize
from train.config.schema import Config
from train.logging import jsonl
from train.logging.throughput import Health
from train.parallel import processes


def restored(run: Run, *, step: int | None = None, allow_changes: bool = False) -> Start:
    """The state from which a run goes on, and what the user is told about it.

    Args:
      run: the run, with the config that it goes on with.
      step: of a checkpoint; default the newest that can be read.
      allow_changes: accept a config or data that differ from the checkpoint.

    Raises:
      ValueError, CheckpointError: as in `train.loop.resume`.
    """
    checkpoints = run.checkpoints
    processes.on_main(checkpoints.repair)
    if step is None:
        again = processes.on_main(lambda: _clear_the_way(run.config, run.folder, checkpoints))
        if note := processes.from_main(again or ""):
            return Start(start.initial(run.config, run.programs), notes=(note,))
    _verify(checkpoints, step)
    done, state, changes = _read(run, step, allow_changes)
    if run.config.steps < done:
        raise ValueError(
            f"steps={run.config.steps} is less than the {done} that the checkpoint has done: ask "
            "for more, or start from an older one with --step."
        )
    notes = [*checkpoints.notes, *changes]
    if step is not None and (later := checkpoints.abandon_later()):
        notes.append(f"going on from step {step}: the later checkpoints, {later}, are deleted")
    if done == run.config.steps:
        notes.append(f"step {done} was the last: nothing is left to train")
    return Start(state, _health(checkpoints), tuple(notes))


def _read(run: Run, step: int | None, allow_changes: bool) -> tuple[int, Any, list[str]]:
    """(step, state, notes about changes since), the same on all processes."""
    changes: list[str] = []

    def accept(saved: Any) -> None:
        now, fingerprint = serialize.to_json(run.config), run.programs.data().fingerprint
        with reading.fields_of(_manifest_of(run.checkpoints)):
            changes[:] = manifest.check(saved, now, fingerprint, allow_changes=allow_changes)

    done, state = processes.on_all(
        lambda: run.checkpoints.restore(
            run.programs.abstract, step, accept=accept, wrong=validate.problem
        )
    )
    processes.check_same(
        {"checkpoint": done},
        "Some cannot read the newest: see that all can, or name an older one with --step.",
    )
    return done, state, changes


def _verify(checkpoints: Checkpoints, step: int | None) -> None:
    """Process 0 reads all files, and all processes go by what it found."""
    faults = processes.on_main(lambda: checkpoints.verify(step)) or {}
    pairs = json.loads(processes.from_main(json.dumps(list(faults.items()))))
    checkpoints.faults.update(pairs)


def _health(checkpoints: Checkpoints) -> Health:
    with reading.fields_of(_manifest_of(checkpoints)):
        return manifest.health(checkpoints.manifest)


def _manifest_of(checkpoints: Checkpoints) -> str:
    return f"the manifest of a checkpoint in {checkpoints.directory}"


def _clear_the_way(config: Config, folder: Path, checkpoints: Checkpoints) -> str:
    """Prepares a run that was killed before its first checkpoint to start again.

    Its metrics are kept under another name: if somebody deleted the checkpoints, they are all that
    is left.

    Returns:
      A note for the user; empty if there is a checkpoint, or must have been one. The second save
      waits for the first to end, and metrics are written before both.
    """
    if checkpoints.directory.is_dir() and any(checkpoints.directory.iterdir()):
        return ""
    path, note = folder / jsonl.FILE, "no checkpoint yet: starting from step 0"
    rows = jsonl.read_history(folder) if path.exists() else []
    if not rows:
        return note
    if max(row["step"] for row in rows) > 2 * config.output.checkpoint_every:
        return ""
    aside = path.with_name(f"metrics-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
    path.rename(aside)
    return f"{note}; the metrics up to step {rows[-1]['step']} are now in {aside}"
