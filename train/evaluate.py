"""Evaluations during a run: when one is due, how much it reads, and that a signal ends it."""

import json
import math
import threading
from typing import Any

from train.checkpoint.run_folder import Run
from train.config.schema import Config
from train.logging.throughput import Meter
from train.parallel import processes


def recall_losses(run: Run, meter: Meter) -> None:
    """Tells the checkpoints the held-out losses that the metrics of a resumed run hold."""
    rows = [row for row in meter.log.kept if "heldout_loss" in row]
    known = [(row["step"], row["heldout_loss"]) for row in rows]
    known = json.loads(processes.from_main(json.dumps(known)))
    finite = {step: math.nan if loss is None else loss for step, loss in known}
    run.checkpoints.losses.update(finite)


def if_due(run: Run, meter: Meter, step: int, params: Any, stop: threading.Event) -> bool:
    """Evaluates if it is time to; false if a signal ended the evaluation."""
    due = step % run.config.evaluate_every == 0 or step == run.config.steps
    return not due or _evaluate(run, meter, step, params, stop)


def if_missing(run: Run, meter: Meter, step: int, params: Any, stop: threading.Event) -> bool:
    """`if_due` for the step a run resumes from, whose evaluation may have been cut short before."""
    done = step == 0 or step in run.checkpoints.losses
    return done or if_due(run, meter, step, params, stop)


def batches(config: Config) -> int | None:
    """Batches of an evaluation before the last step's; None reads all."""
    tokens = config.batch_size * config.sequence_length
    return -(-config.output.evaluate_tokens // tokens) or None


def _evaluate(run: Run, meter: Meter, step: int, params: Any, stop: threading.Event) -> bool:
    meter.flush()
    agree = processes.Agreement()
    found = run.programs.evaluate(
        params,
        batches=None if step == run.config.steps else batches(run.config),
        stopped=lambda: agree(stop.is_set())[0],
    )
    if found is not None:
        meter.log.evaluate(step, found)
        run.checkpoints.losses[step] = found["heldout_loss"]
    meter.restart(step)
    return found is not None
