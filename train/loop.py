"""A run from start to end; it knows no optimizer."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from train import baseline, evaluate, files, inputs, lock, program, report
from train.checkpoint import manifest, moved, policy, store, warm_start
from train.checkpoint.restore import Start, restored
from train.config import command_line, schema, serialize
from train.config.schema import Config, OutputConfig
from train.extras import check_installed
from train.logging import jsonl, profiler, run_log, trackers
from train.logging.throughput import Health, Meter
from train.optimizers.base import Due
from train.parallel import processes, signals
from train.parallel.mesh import MeshConfig
from train.step.train_step import TrainState

check_installed("orbax", "matplotlib")  # before hours of training, not at the first save or after

History = list[dict[str, Any]]


def train(config: Config, *, others: Sequence[trackers.Writer] = ()) -> History:
    """Trains a model in a new folder.

    Of several processes (`distributed.start`) all call it, with the same config.

    Args:
      config: such as `preset("tiny", "sophia-g")`, changed with `dataclasses.replace`.
      others: take the metrics too, on process 0, and are closed at the end.

    Returns:
      The history: one dict for each line of the folder's `metrics.jsonl`.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch not the mesh; the folder is taken;
        processes disagree.
      FloatingPointError: the loss or the gradient was not finite, too many steps in a row.
      CheckpointError: a checkpoint cannot be written.
      OSError: another file cannot.
      Stopped: SIGINT or SIGTERM came; the step under way was finished and saved first. It is a
        KeyboardInterrupt, and ends a loop over runs.
    """
    config = schema.resolved(config, jax.default_backend())
    config = processes.on_all(functools.partial(inputs.settled, config))
    with _new(config) as folder:
        if config.output.recompute_reference:
            baseline.recompute(config, folder, train)
        program.use_compile_cache(config.output.compile_cache)
        programs = program.assemble(config)
        _read_data(programs)  # what cannot be read is no reason to compile
        with _checkpoints(config, folder) as checkpoints:
            start = Start(_initial(config, programs))
            return _run(config, folder, programs, start, checkpoints, others)


def begin(config: Config) -> None:
    """Makes the folder of a run that has done no step, with a checkpoint to go on from.

    Raises:
      ValueError, CheckpointError, OSError: as in `train`.
    """
    config = schema.resolved(config, jax.default_backend())
    config = processes.on_all(functools.partial(inputs.settled, config))
    with _new(config) as folder:
        programs = program.assemble(config)
        with _checkpoints(config, folder) as checkpoints:
            beside = manifest.make(0, serialize.to_json(config), _read_data(programs), Health())
            checkpoints.save(0, _initial(config, programs), record=beside, force=True)
        processes.on_main(lambda: serialize.save(config, folder))


@contextlib.contextmanager
def _new(config: Config) -> Iterator[Path]:
    """A folder that no run has, held by this one."""
    processes.check_same(_shared(config))
    folder = Path(config.output.folder or f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = Path(processes.from_main(str(folder)))
    processes.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    with _owned(folder):
        processes.on_main(lambda: _must_be_free(folder))
        yield folder


def _initial(config: Config, programs: program.Program) -> TrainState:
    state = programs.init()
    if config.start_from:
        names = programs.data().class_names
        params = warm_start.start_from(
            Path(config.start_from).expanduser(), config, state.params, names
        )
        state = state._replace(params=params)
    return state


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
      steps: train to this many steps instead; the learning rate then follows the other schedule,
        which is higher where it is longer.
      step: start from this checkpoint, which ends the later ones; default the newest that can be
        read, and the beginning where the run was stopped before its first.
      warmup_steps: other than before.
      mesh: other than before.
      data: where the data is now, if it has moved. It must be the same data.
      allow_changes: go on although config or data are not those of the checkpoint.
      compile_cache: as in `OutputConfig`; a run's folder may come from elsewhere, and must not say
        where compiled programs are taken from.

    Returns:
      The history of the whole run.

    Raises:
      ValueError: the folder is missing or holds no run, or is in use; `steps` are fewer than were
        done; config or data are not those of the checkpoint.
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
    asked = {"folder": str(folder), "step": step, "allow_changes": allow_changes}
    processes.check_same(_shared(config) | asked)
    with _owned(folder):
        program.use_compile_cache(_cache(config.output, compile_cache))
        programs = program.assemble(config)
        with moved.explained(config):
            _read_data(programs)
        with _checkpoints(config, folder) as checkpoints:
            start = restored(
                config,
                folder,
                programs,
                checkpoints,
                lambda: _initial(config, programs),
                step=step,
                allow_changes=allow_changes,
            )
            return _run(config, folder, programs, start, checkpoints)


def _read_data(programs: program.Program) -> str:
    """The fingerprint of the data, which all processes can read and is the same on all."""
    fingerprint = processes.on_all(programs.data).fingerprint
    processes.check_same({"data": fingerprint})
    return fingerprint


def _shared(config: Config) -> dict[str, Any]:
    return {"config": serialize.to_json(config), "versions": manifest.versions()}


def _cache(shown: OutputConfig, asked: str | None) -> str:
    if asked is not None:
        return asked
    return shown.compile_cache and OutputConfig.compile_cache


def _must_be_free(folder: Path) -> None:
    if (folder / "config.json").exists():
        raise ValueError(
            f"{folder} already holds a run: resume it with "
            f"`{command_line.call('resume', folder)}`, or choose another --output.folder."
        )


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, on process 0 for all."""

    def hold() -> None:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ValueError(f"{folder} {what}: give the folder of a run.")
        stack.enter_context(lock.hold(folder, print))

    with contextlib.ExitStack() as stack:
        processes.on_main(hold)
        yield


def _checkpoints(config: Config, folder: Path) -> store.Checkpoints:
    return store.Checkpoints(
        files.inside(folder, "checkpoints"),
        save_interval=config.output.checkpoint_every,
        keep_last=config.output.keep_checkpoints,
    )


def _run(
    config: Config,
    folder: Path,
    programs: program.Program,
    start: Start,
    checkpoints: store.Checkpoints,
    others: Sequence[trackers.Writer] = (),
) -> History:
    """Trains from `start` to the last step, or until a signal, then reports."""
    with signals.stopping() as stop:
        state, ended = _steps(config, folder, programs, start, checkpoints, others, stop)
        history = jsonl.read_history(folder) if processes.is_main() else []
        report.finish(config, folder, history, programs, state, ended=ended, stop=stop)
    if not ended:
        raise signals.Stopped(folder, int(state.step))
    return history


def _steps(
    config: Config,
    folder: Path,
    programs: program.Program,
    start: Start,
    checkpoints: store.Checkpoints,
    others: Sequence[trackers.Writer],
    stop: threading.Event,
) -> tuple[TrainState, bool]:
    """The state when it was saved last, and whether nothing is left to do."""
    state, first = start.state, int(start.state.step)
    done, agree = first, processes.Agreement()
    with contextlib.ExitStack() as stack:
        log = processes.on_main(lambda: stack.enter_context(_log(config, folder, first, others)))
        log = log or stack.enter_context(run_log.RunLog(folder, config.steps, silent=True))
        for note in start.notes:
            log.print(note)
        told = lambda: agree.at_once(stop.is_set(), False)[0]  # noqa: E731
        step = _compiled(config, programs, range(first, config.steps), start.health.owed, log, told)
        # Only now: a run that does not compile leaves its folder free.
        processes.on_main(lambda: serialize.save(config, folder))
        meter = Meter(config, log, first, start.health)
        keep = policy.Saver(config, programs, checkpoints, meter)
        judge = evaluate.Judge(config, programs, checkpoints, meter, stop)
        shown = config.output.profile if processes.is_main() else ""
        trace = stack.enter_context(profiler.profiler(shown, folder / "profile", log.print))
        trace(first, state)
        stopped = told() or not judge.unless_judged(first, state.params)
        if stopped or first == config.steps:  # the schedule may be a new one
            keep.save(first, state, last=True)
        while done < config.steps and not stopped:
            due = _due(programs, done, meter.health)
            state, measured = step[due](state, programs.batch(done))
            done += 1
            meter.report(done, measured, True in due)
            trace(done, measured)
            stopped, overdue = agree(stop.is_set(), keep.overdue())
            keep.save(done, state, overdue=overdue, last=stopped or done == config.steps)
            # Saved first: an evaluation may take longer than a process that is told to stop has.
            if not stopped and not judge.if_due(done, state.params):
                stopped = True
                keep.save(done, state, last=True)
        if stopped:
            log.print(f"stopping: waiting until step {done} is saved")
        checkpoints.close()  # what is said to be saved is; a first signal does not end it
    return state, not stopped


def _log(
    config: Config, folder: Path, first: int, others: Sequence[trackers.Writer]
) -> run_log.RunLog:
    takers = list(others)
    if config.output.tensorboard:
        takers.append(trackers.TensorBoard(folder / "tensorboard", first))
    if config.output.wandb:
        takers.append(trackers.Wandb(config.output.wandb, folder, serialize.to_json(config)))
    return run_log.RunLog(folder, config.steps, first, quiet=config.output.quiet, writers=takers)


def _due(programs: program.Program, step: int, health: Health) -> Due:
    """What this step renews: what is due, and what was due at a skipped step before it."""
    return programs.optimizer.due(step, pending=health.owed)


def _compiled(
    config: Config,
    programs: program.Program,
    steps: range,
    owed: bool,
    log: run_log.RunLog,
    told: Callable[[], bool],
) -> dict[Due, Any]:
    """The programs that these steps need, by what they renew, so that errors come before the steps.

    If the run is `told` to stop, the remaining programs are not compiled.
    """
    compiled = {}
    names = {True: "step that samples curvature", False: "plain step", None: "step"}
    due = [_due(programs, step, Health(owed=owed and step == steps.start)) for step in steps]
    for kind in dict.fromkeys(due):
        if told():
            break
        with log.compiling(names[kind.refresh]):
            compiled[kind] = programs.compile(kind)
    return compiled
