"""Trains a run, new or resumed, to its end. It is independent of the optimizer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train import baseline, program, report, stepping
from train.checkpoint import moved, restore, run_folder, start
from train.checkpoint.run_folder import Run
from train.checkpoint.start import Start, begin
from train.config import serialize
from train.config.schema import Config, OutputConfig
from train.extras import check_installed
from train.logging import jsonl
from train.logging.trackers import Tracker
from train.parallel import processes, signals
from train.parallel.mesh import MeshConfig

__all__ = ["begin", "resume", "train"]

check_installed("orbax", "matplotlib")  # before hours of training, not at the first save or after

History = list[dict[str, Any]]


def train(config: Config, *, others: Sequence[Tracker] = ()) -> History:
    """Trains a model in a new folder.

    With several processes (`processes.start`), all of them call it with the same config.

    Args:
      config: such as `preset("tiny", "sophia-g")`, changed with `dataclasses.replace`.
      others: trackers that get the metrics too, on process 0; they are closed at the end.

    Returns:
      The history: one dict for each line of the folder's `metrics.jsonl`.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch not the mesh; the folder is taken;
        processes disagree.
      FloatingPointError: the loss or the gradient was not finite, too many steps in a row.
      CheckpointError: a checkpoint cannot be written.
      OSError: another file cannot be written.
      Stopped: SIGINT or SIGTERM came; the step in progress was finished and saved first. It is a
        KeyboardInterrupt, so it also ends a loop over runs.
    """
    config = start.recorded(config)
    with run_folder.new(config) as folder:
        if config.output.recompute_reference:
            baseline.recompute(config, folder, train)
        program.use_compile_cache(config.output.compile_cache)
        programs = program.assemble(config)
        start.read_data(programs)  # before compiling: unreadable data should fail at once
        with run_folder.checkpoints(config, folder) as checkpoints:
            run = Run(config, folder, programs, checkpoints)
            return _train(run, Start(start.initial(config, programs)), others)


def resume(
    folder: Path,
    *,
    steps: int | None = None,
    step: int | None = None,
    warmup_steps: int | None = None,
    mesh: MeshConfig | None = None,
    data: moved.Places = moved.STAYED,
    allow_changes: bool = False,
    compile_cache: str | None = None,
) -> History:
    """Goes on with a run as if it had not stopped.

    Args:
      folder: of the run.
      steps: train to this many steps instead; the learning rate then follows the schedule of that
        length, which is higher if it is longer.
      step: start from this checkpoint and delete the later ones. Default the newest that can be
        read, or step 0 if the run was stopped before its first checkpoint.
      warmup_steps: another number than before.
      mesh: another mesh than before.
      data: where the data is now, if it has moved. It must be the same data.
      allow_changes: go on although config or data differ from the checkpoint.
      compile_cache: as in `OutputConfig`. A folder from elsewhere must not decide where compiled
        programs are read from, so the run's own setting only turns the cache off.

    Returns:
      The history of the whole run.

    Raises:
      ValueError: the folder is missing, holds no run, or is in use; `steps` is less than the steps
        done; config or data differ from the checkpoint.
      CheckpointError: no checkpoint can be read.
      FloatingPointError, OSError, Stopped: as in `train`.
    """
    folder = Path(folder)
    config = moved.placed(serialize.load(folder), data)
    config = dataclasses.replace(
        config,
        steps=config.steps if steps is None else steps,
        warmup_steps=config.warmup_steps if warmup_steps is None else warmup_steps,
        mesh=mesh or config.mesh,
    )
    run_folder.check_same(config, folder=str(folder), step=step, allow_changes=allow_changes)
    with run_folder.locked(folder):
        program.use_compile_cache(_cache(config.output, compile_cache))
        programs = program.assemble(config)
        with moved.explained(config):
            start.read_data(programs)
        with run_folder.checkpoints(config, folder) as checkpoints:
            run = Run(config, folder, programs, checkpoints)
            return _train(run, restore.restored(run, step=step, allow_changes=allow_changes))


def _cache(shown: OutputConfig, asked: str | None) -> str:
    if asked is not None:
        return asked
    return shown.compile_cache and OutputConfig.compile_cache


def _train(run: Run, begun: Start, others: Sequence[Tracker] = ()) -> History:
    """Trains to the last step, or until a signal, then reports."""
    with signals.stopping() as stop:
        state, ended = stepping.advance(run, begun, others, stop)
        history = jsonl.read_history(run.folder) if processes.is_main() else []
        report.finish(run.config, run.folder, history, run.programs, state, ended=ended, stop=stop)
    if not ended:
        raise signals.Stopped(run.folder, int(state.step))
    return history
