"""A run from start to end; it knows no optimizer."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax

from train import checkpoint, config, metrics, program, reference, report
from train.config import Config
from train.step import TrainState

History = list[dict[str, Any]]


def train(run: Config) -> History:
    """Trains a model in a new folder.

    Args:
      run: such as `preset("tiny", "sophia-g")`, changed with `dataclasses.replace`.

    Returns:
      The history: one dict for each line of the folder's `metrics.jsonl`.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch not the mesh; the folder is taken.
      FloatingPointError: the loss is not finite.
    """
    if run.run.recompute_reference:
        reference.recompute(run, train)
    folder = Path(run.run.folder or f"runs/{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "config.json").exists():
        raise ValueError(
            f"{folder} already holds a run: resume it with `python -m train resume {folder}`, or "
            "choose another --run.folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    program.use_compile_cache(run.run.compile_cache)
    programs = program.assemble(run)
    with _checkpoints(run, folder) as checkpoints:
        return _run(run, folder, programs, programs.init(), checkpoints)


def resume(folder: Path, *, steps: int | None = None, step: int | None = None) -> History:
    """Goes on with a run as if it had not stopped.

    Args:
      folder: of the run.
      steps: train to this many steps instead; the learning rate follows the longer schedule.
      step: start from this checkpoint; default the newest.

    Returns:
      The history of the whole run.

    Raises:
      ValueError: the folder is missing or holds no run.
      CheckpointError: no checkpoint can be read.
      FloatingPointError: the loss is not finite.
    """
    run = config.load(folder)
    run = dataclasses.replace(run, steps=steps or run.steps)
    program.use_compile_cache(run.run.compile_cache)
    programs = program.assemble(run)
    with _checkpoints(run, folder) as checkpoints:
        _, state = checkpoints.restore(programs.abstract, step)
        return _run(run, folder, programs, state, checkpoints)


def _checkpoints(run: Config, folder: Path) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(
        folder / "checkpoints",
        save_interval=run.run.checkpoint_every,
        keep_last=run.run.keep_checkpoints,
    )


def _run(
    run: Config,
    folder: Path,
    programs: program.Program,
    state: TrainState,
    checkpoints: checkpoint.Checkpoints,
) -> History:
    """Trains from `state` to the last step, then reports; Ctrl-C saves and stops."""
    config.save(run, folder)
    first = int(state.step)
    with metrics.RunLog(folder, run.steps, first, quiet=run.run.quiet) as log:
        meter = _Meter(run, log, first)
        heldout: dict[str, float] = {}
        try:
            for done in range(first + 1, run.steps + 1):
                refresh = _refresh_due(run, done - 1)
                state, measured = programs.step(state, programs.batch(done - 1), refresh=refresh)
                meter.report(done, measured)
                if done % run.evaluate_every == 0 or done == run.steps:
                    heldout = programs.evaluate(state.params)
                    log.evaluate(done, heldout)
                loss = {"loss": heldout["heldout_loss"]} if heldout else None
                checkpoints.save(done, state, metrics=loss, force=done == run.steps)
        except KeyboardInterrupt:
            checkpoints.save(int(state.step), state, force=True)
        meter.flush()
    report.finish(run, folder, programs.apply, state)
    return metrics.read_history(folder)


def _refresh_due(run: Config, step: int) -> bool:
    """Whether this step's program samples curvature; never, for optimizers without an interval."""
    interval = getattr(run.optim, "update_interval", 0)
    return interval > 0 and step % interval == 0


class _Meter:
    """Fetches metrics one step late, so that the device always has a step to work on."""

    def __init__(self, run: Config, log: metrics.RunLog, first: int):
        self.run, self.log = run, log
        self.last, self.clock = first, time.perf_counter()
        self.pending: tuple[int, dict[str, jax.Array]] | None = None

    def report(self, step: int, measured: dict[str, jax.Array]) -> None:
        self.flush()
        if step % self.run.run.log_every == 0 or step in (1, self.run.steps):
            self.pending = (step, measured)

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, measured), self.pending = self.pending, None
        values: dict[str, float] = {
            name: float(value) for name, value in jax.device_get(measured).items()
        }
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {step}. Lower --optim.learning-rate, or "
                "lengthen --warmup-steps; checkpoints from before it are kept."
            )
        values["learning_rate"] = float(jax.device_get(self.run.schedule(step - 1)))
        values["tokens_per_second"] = self._tokens_per_second(step)
        self.log.train(step, values)

    def _tokens_per_second(self, step: int) -> float:
        now = time.perf_counter()
        tokens = (step - self.last) * self.run.batch_size * self.run.sequence_length
        rate = tokens / max(now - self.clock, 1e-9)
        self.last, self.clock = step, now
        return rate
