"""A run from start to end; it knows no optimizer."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from train import checkpoint, config, metrics, program, reference, report
from train.config import Config
from train.optimizers import refresh_due
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
      KeyboardInterrupt: SIGINT or SIGTERM came; the step under way was finished and saved first.
    """
    folder = Path(run.run.folder or f"runs/{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "config.json").exists():
        raise ValueError(
            f"{folder} already holds a run: resume it with `python -m train resume {folder}`, or "
            "choose another --run.folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if run.run.recompute_reference:
        reference.recompute(run, train)
    program.use_compile_cache(run.run.compile_cache)
    programs = program.assemble(run)
    with _checkpoints(run, folder) as checkpoints:
        return _run(run, folder, programs, programs.init(), checkpoints)


def resume(folder: Path, *, steps: int | None = None, step: int | None = None) -> History:
    """Goes on with a run as if it had not stopped.

    Args:
      folder: of the run.
      steps: train to this many steps instead; the learning rate then follows the other schedule,
        which is higher where it is longer.
      step: start from this checkpoint; default the newest.

    Returns:
      The history of the whole run.

    Raises:
      ValueError: the folder is missing or holds no run; `steps` are fewer than were done.
      CheckpointError: no checkpoint can be read.
      FloatingPointError: the loss is not finite.
      KeyboardInterrupt: as in `train`.
    """
    run = config.load(folder)
    run = dataclasses.replace(run, steps=run.steps if steps is None else steps)
    program.use_compile_cache(run.run.compile_cache)
    programs = program.assemble(run)
    with _checkpoints(run, folder) as checkpoints:
        done, state = checkpoints.restore(programs.abstract, step)
        if run.steps < done:
            raise ValueError(
                f"steps={run.steps} is less than the {done} that the checkpoint has done: ask for "
                "more, or start from an older one with --step."
            )
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
    """Trains from `state` to the last step, or until a signal, then reports."""
    first = done = int(state.step)
    measured, heldout = {}, {}
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(metrics.RunLog(folder, run.steps, first, quiet=run.run.quiet))
        step = _compiled(run, programs, range(first, run.steps), log)
        config.save(run, folder)  # only now: a run that does not compile leaves its folder free
        stop = stack.enter_context(_signals())
        meter = _Meter(run, log, checkpoints, first)

        def save(force: bool) -> None:
            if force or done % run.run.checkpoint_every == 0:
                _check_finite(measured, done, checkpoints)
                checkpoints.save(done, state, metrics=heldout or None, force=force)

        while done < run.steps and not stop.is_set():
            state, measured = step[refresh_due(run.optim, done)](state, programs.batch(done))
            done, heldout = done + 1, {}
            meter.report(done, measured)
            if done % run.evaluate_every == 0 or done == run.steps:
                meter.flush()
                evaluated = programs.evaluate(state.params)
                log.evaluate(done, evaluated)
                heldout = {"loss": evaluated["heldout_loss"]}
                meter.restart(done)
            save(force=False)
        meter.flush()
        save(force=True)
    history = metrics.read_history(folder)
    report.finish(run, folder, history, programs.apply, state)
    if done < run.steps:
        raise KeyboardInterrupt(f"stopped at step {done}, which is saved")
    return history


def _compiled(
    run: Config, programs: program.Program, steps: range, log: metrics.RunLog
) -> dict[bool | None, Any]:
    """The programs that these steps need, by `refresh`: what does not compile fails before them."""
    compiled = {}
    names = {True: "step that samples curvature", False: "plain step", None: "step"}
    for refresh in dict.fromkeys(refresh_due(run.optim, step) for step in steps):
        with log.compiling(names[refresh]):
            compiled[refresh] = programs.compile(refresh)
    return compiled


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets: the state is whole only between steps.

    The second SIGINT interrupts at once. Outside the main thread signals are not ours to handle.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _check_finite(measured: Mapping[str, Any], step: int, checkpoints: checkpoint.Checkpoints):
    """A state with a loss that is not finite must never push a good one out."""
    loss = float(measured.get("loss", 0.0))
    if not math.isfinite(loss):
        kept = checkpoints.latest
        raise FloatingPointError(
            f"the loss is {loss} at step {step}. Lower --optim.learning-rate, or lengthen "
            "--warmup-steps"
            + (f"; the checkpoint of step {kept} is kept." if kept else "; nothing was saved yet.")
        )


class _Meter:
    """Fetches metrics one step late, so that the device always has a step to work on."""

    def __init__(
        self,
        run: Config,
        log: metrics.RunLog,
        checkpoints: checkpoint.Checkpoints,
        first: int,
    ):
        self.run, self.log, self.checkpoints = run, log, checkpoints
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.restart(first)

    def restart(self, step: int) -> None:
        """Starts the clock at a step: what came before is not counted as training."""
        self.since, self.clock = step, time.perf_counter()

    def report(self, step: int, measured: dict[str, jax.Array]) -> None:
        self.flush()
        if step % self.run.run.log_every == 0 or step in (1, self.run.steps):
            self.pending = (step, measured)

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, measured), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(measured).items()}
        _check_finite(values, step, self.checkpoints)
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        tokens = (step - self.since) * self.run.batch_size * self.run.sequence_length
        values["learning_rate"] = float(jax.device_get(self.run.schedule(step - 1)))
        values["tokens_per_second"] = tokens / seconds
        self.log.train(step, values)
        self.restart(step)
