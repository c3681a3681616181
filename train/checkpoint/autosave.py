"""Saves the states of a run that is training."""

import time

from train.checkpoint import manifest, policy, validate
from train.checkpoint.run_folder import Run
from train.config import serialize
from train.logging.throughput import Meter
from train.parallel import processes
from train.step.train_step import TrainState


class Autosave:
    """Saves a state when `policy.save_due` says so, after the metrics of all steps up to it."""

    def __init__(self, run: Run, meter: Meter):
        self.run, self.meter = run, meter
        self.clock = time.perf_counter()  # of the last save
        self.stale = -1  # up to this step, `overdue` was raised before the last save

    def overdue(self) -> bool:
        """Whether the clock of this process asks for a save."""
        seconds = time.perf_counter() - self.clock
        return policy.overdue(seconds, self.run.config.output.checkpoint_minutes)

    def save(
        self, step: int, state: TrainState, *, overdue: bool = False, last: bool = False
    ) -> None:
        """Saves a state if it is due.

        Args:
          step: steps done.
          state: after that step.
          overdue: `overdue` of any process, which several processes hear a step late.
          last: the run ends or stops here.

        Raises:
          FloatingPointError: parameters or optimizer state are not finite. No later step can mend
            them, and they must never replace a good checkpoint.
        """
        every = self.run.config.output.checkpoint_every
        overdue = overdue and step > self.stale
        if not policy.save_due(step, every=every, overdue=overdue, last=last):
            return
        self.meter.flush()
        if bad := validate.nonfinite_leaf(state):
            raise FloatingPointError(
                f"{bad} is not finite at step {step}, which is not saved. Lower "
                f"--optim.learning-rate, or lengthen --warmup-steps; {self._kept()}."
            )
        self.meter.log.sync()
        config, health = serialize.to_json(self.run.config), self.meter.health
        beside = manifest.make(step, config, self.run.programs.data().fingerprint, health)
        self.run.checkpoints.save(step, state, beside)
        self.clock, self.stale = time.perf_counter(), step + processes.late()

    def _kept(self) -> str:
        latest = self.run.checkpoints.latest
        return "nothing was saved yet" if latest is None else f"step {latest} is kept"
