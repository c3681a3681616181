"""The steps of a run, and what the host does around them: compile, log, save, evaluate, stop."""

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from train import evaluate
from train.checkpoint.autosave import Autosave
from train.checkpoint.run_folder import Run
from train.checkpoint.start import Start
from train.config import serialize
from train.logging import profiler, trackers
from train.logging.run_log import RunLog
from train.logging.throughput import Health, Meter
from train.logging.trackers import Tracker
from train.optimizers.base import Due
from train.parallel import processes
from train.step.train_step import TrainState


def advance(
    run: Run, begun: Start, others: Sequence[Tracker], stop: threading.Event
) -> tuple[TrainState, bool]:
    """Opens what a run needs around its steps, and takes them.

    Returns:
      (the state that was saved last, whether the run is done).
    """
    with contextlib.ExitStack() as stack:
        log = _open_log(run, int(begun.state.step), others, stack)
        for note in begun.notes:
            log.print(note)
        host = _host(run, begun, log, stop, stack)
        state, stopped = _until_stopped(run, begun.state, host)
        if stopped:
            log.print(f"stopping: waiting until step {int(state.step)} is saved")
        run.checkpoints.close()  # a step that was reported as saved must be; a signal may come
    return state, not stopped


class _Host(NamedTuple):
    """What the host does around the steps."""

    compiled: dict[Due, Any]  # what a step renews -> its program
    meter: Meter
    autosave: Autosave
    trace: Callable[[int, Any], None]  # called with a step and an array that it made
    evaluate_if_due: Callable[[int, Any], bool]  # (step, params) -> false if a signal ended it
    evaluate_if_missing: Callable[[int, Any], bool]
    stop: threading.Event
    agree: processes.Agreement

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop."""
        return _asked_to_stop(self.agree, self.stop)


def _open_log(
    run: Run, first: int, others: Sequence[Tracker], stack: contextlib.ExitStack
) -> RunLog:
    """The log of process 0; a silent one on the other processes."""

    def opened() -> RunLog:
        output, steps = run.config.output, run.config.steps
        asked = trackers.asked_for(output, run.folder, serialize.to_json(run.config), first)
        writers = [*others, *asked]
        log = RunLog(run.folder, steps, first, quiet=output.quiet, writers=writers)
        return stack.enter_context(log)

    silent = RunLog(run.folder, run.config.steps, silent=True)
    return processes.on_main(opened) or stack.enter_context(silent)


def _host(
    run: Run, begun: Start, log: RunLog, stop: threading.Event, stack: contextlib.ExitStack
) -> _Host:
    """Compiles the programs, then writes the run's config and sets up what the host does."""
    first, agree = int(begun.state.step), processes.Agreement()
    compiled = _compiled(
        run, first, begun.health, log, functools.partial(_asked_to_stop, agree, stop)
    )
    # Only now: a run that does not compile leaves its folder free.
    processes.on_main(lambda: serialize.save(run.config, run.folder))
    meter = Meter(run.config, log, first, begun.health)
    autosave = Autosave(run, meter)
    evaluate.recall_losses(run, meter)
    traced = run.config.output.profile if processes.is_main() else ""
    return _Host(
        compiled,
        meter,
        autosave,
        stack.enter_context(profiler.profiler(traced, run.folder / "profile", log.print)),
        functools.partial(evaluate.if_due, run, meter, stop=stop),
        functools.partial(evaluate.if_missing, run, meter, stop=stop),
        stop,
        agree,
    )


def _until_stopped(run: Run, state: TrainState, host: _Host) -> tuple[TrainState, bool]:
    """Steps to the last one, or until a process is asked to stop; saves the last state."""
    done, steps, save = int(state.step), run.config.steps, host.autosave.save
    host.trace(done, state)
    stopped = host.asked_to_stop() or not host.evaluate_if_missing(done, state.params)
    if stopped or done == steps:  # the schedule may be a new one
        save(done, state, last=True)
    while done < steps and not stopped:
        due = _due(run, done, host.meter.health)
        if due not in host.compiled:  # owed by skipped steps, in a combination of its own
            host.compiled[due] = run.programs.compile(due)
        state, measured = host.compiled[due](state, run.programs.batch(done))
        done += 1
        host.meter.report(done, measured, due)
        host.trace(done, measured)
        stopped, overdue = host.agree(host.stop.is_set(), host.autosave.overdue())
        save(done, state, overdue=overdue, last=stopped or done == steps)
        # Saved first: an evaluation may take longer than a process that was asked to stop has left.
        if not stopped and not host.evaluate_if_due(done, state.params):
            stopped = True
            save(done, state, last=True)
    return state, stopped


def _asked_to_stop(agree: processes.Agreement, stop: threading.Event) -> bool:
    return agree.at_once(stop.is_set(), False)[0]


def _due(run: Run, step: int, health: Health) -> Due:
    """What a step renews: what is due, and what was due at a skipped step before it."""
    return run.programs.optimizer.due(step, pending=health.pending)


def _compiled(
    run: Run, first: int, health: Health, log: RunLog, asked_to_stop: Callable[[], bool]
) -> dict[Due, Any]:
    """The programs that the steps from `first` on need, by what they renew.

    Errors of compilation come before the first step. Once `asked_to_stop`, the remaining programs
    are not compiled.
    """
    compiled = {}
    due = [
        _due(run, step, health if step == first else Health())
        for step in range(first, run.config.steps)
    ]
    for kind in dict.fromkeys(due):
        if asked_to_stop():
            break
        with log.compiling(kind.name):
            compiled[kind] = run.programs.compile(kind)
    return compiled
