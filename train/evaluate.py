"""Evaluations of a run: when there is one, how much it reads, and that a signal ends it."""

import json
import math
import threading
from typing import Any

from train import program
from train.checkpoint import store
from train.config.schema import Config
from train.logging.throughput import Meter
from train.parallel import processes


class Judge:
    """Evaluates at intervals and at the end, and tells the checkpoints their held-out losses."""

    def __init__(
        self,
        config: Config,
        programs: program.Program,
        checkpoints: store.Checkpoints,
        meter: Meter,
        stop: threading.Event,
    ):
        self.config, self.programs, self.checkpoints = config, programs, checkpoints
        self.meter, self.stop = meter, stop
        rows = [row for row in meter.log.kept if "heldout_loss" in row]
        known = [(row["step"], row["heldout_loss"]) for row in rows]
        known = json.loads(processes.from_main(json.dumps(known)))
        finite = {step: math.nan if loss is None else loss for step, loss in known}
        checkpoints.losses.update(finite)

    def if_due(self, step: int, params: Any) -> bool:
        """Evaluates where it is time to; false if a signal ended it."""
        return not self._due(step) or self._evaluate(step, params)

    def unless_judged(self, step: int, params: Any) -> bool:
        """`if_due` for the first step of a resumed run, which may have been cut short before."""
        return step == 0 or step in self.checkpoints.losses or self.if_due(step, params)

    def _due(self, step: int) -> bool:
        return step % self.config.evaluate_every == 0 or step == self.config.steps

    def _evaluate(self, step: int, params: Any) -> bool:
        self.meter.flush()
        agree = processes.Agreement()
        found = self.programs.evaluate(
            params,
            batches=None if step == self.config.steps else batches(self.config),
            stopped=lambda: agree(self.stop.is_set())[0],
        )
        if found is not None:
            self.meter.log.evaluate(step, found)
            self.checkpoints.losses[step] = found["heldout_loss"]
        self.meter.restart(step)
        return found is not None


def batches(config: Config) -> int | None:
    """Batches of an evaluation before the last; None reads all."""
    tokens = config.batch_size * config.sequence_length
    return -(-config.output.evaluate_tokens // tokens) or None
