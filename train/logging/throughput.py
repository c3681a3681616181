"""Metrics of steps on their way to the log: throughput, skipped steps, spikes of the loss."""

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from train.config.schema import Config
from train.logging import run_log
from train.optimizers.base import Due
from train.plan.flops import model_flops, peak_flops


class Health(NamedTuple):
    """What a resumed run must know about earlier steps and cannot read in its metrics."""

    skipped: int = 0  # steps that changed nothing, since their loss or gradient was not finite
    in_a_row: int = 0  # how many of the last steps were skipped
    refresh_pending: bool = False  # a skipped step was to refresh curvature: the next one does
    renew_pending: bool = False  # the same of roots and projections

    @property
    def pending(self) -> Due:
        """What skipped steps were to renew."""
        return Due(self.refresh_pending, self.renew_pending)


class Meter:
    """Fetches metrics one step late, so that the device always has a step to work on.

    It waits for the end of a step that renews curvature or roots: if that step was skipped, the
    next one must do so instead.
    """

    def __init__(self, config: Config, log: run_log.RunLog, first: int, health: Health):
        self.config, self.log, self.health = config, log, health
        self.spikes = Spikes(config.output.spike, log.kept) if config.output.spike else None
        self.peak = (peak_flops(jax.devices()[0].device_kind) or 0.0) * jax.device_count()
        self._pending: deque[tuple[int, Mapping[str, jax.Array], Due]] = deque()
        self.restart(first)

    def restart(self, step: int) -> None:
        """Starts the clock at a step: the time before does not count as training."""
        self._restart(step, time.perf_counter())

    def _restart(self, step: int, now: float) -> None:
        self.since, self.clock = step, now

    def report(self, step: int, measured: Mapping[str, jax.Array], due: Due) -> None:
        """Takes the metrics of a step that may still be in flight.

        Args:
          step: steps done, this one included.
          measured: its metrics.
          due: what it renewed.

        Raises:
          FloatingPointError: too many steps in a row were skipped.
        """
        self._pending.append((step, measured, due))
        self._take(0 if True in due else 1)

    def flush(self) -> None:
        """Waits for the last reported step."""
        self._take(0)

    def _take(self, keep: int) -> None:
        while len(self._pending) > keep:
            step, measured, due = self._pending.popleft()
            self._count(float(measured["skipped"]) > 0.5, due)
            if step % self.config.output.log_every == 0 or step in (1, self.config.steps):
                self._record(step, measured)
            self._check(step)

    def _count(self, skipped: bool, due: Due) -> None:
        self.health = Health(
            skipped=self.health.skipped + skipped,
            in_a_row=self.health.in_a_row + 1 if skipped else 0,
            refresh_pending=skipped if due.refresh else self.health.refresh_pending,
            renew_pending=skipped if due.renew else self.health.renew_pending,
        )

    def _check(self, step: int) -> None:
        count = self.health.in_a_row
        if count >= self.config.output.max_bad_steps:
            raise FloatingPointError(
                f"the loss or the gradient is not finite at {count} steps in a row, up to step "
                f"{step}: none of them changed the model. Lower --optim.learning-rate, or lengthen "
                "--warmup-steps, or look at the data of these steps."
            )

    def _record(self, step: int, measured: Mapping[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(dict(measured)).items()}
        now = time.perf_counter()  # what follows may wait for the next step
        del values["skipped"]
        seconds = max(now - self.clock, 1e-9)
        tokens = (step - self.since) * self.config.batch_size * self.config.sequence_length
        # The optimizer counts the earlier steps that were not skipped.
        counted = step - 1 - self.health.skipped + (self.health.in_a_row > 0)
        values["learning_rate"] = float(jax.device_get(self.config.schedule(counted)))
        values["skipped_steps"] = self.health.skipped
        if self.spikes:
            values["spikes"], excess = self.spikes.add(values["loss"])
            if excess:
                self.log.print(f"step {step}: loss {values['loss']:.3f} is a spike, {excess}")
        values["tokens_per_second"] = tokens / seconds
        if self.peak:
            steps = model_flops(
                self.config.model, self.config.batch_size, self.config.sequence_length
            )
            values["mfu"] = (step - self.since) * steps / seconds / self.peak
        self.log.train(step, values)
        self._restart(step, now)


class Spikes:
    """Finds losses far above the recent ones.

    Args:
      threshold: standard deviations above the mean of the last 50 losses.
      rows: metrics of the steps before a resume; the result is as if the run had not stopped.
    """

    def __init__(self, threshold: float, rows: Sequence[Mapping[str, Any]] = ()):
        self.threshold, self.count = threshold, 0
        self._recent: deque[float] = deque(maxlen=50)
        for row in rows:
            if row.get("loss") is not None:
                self._recent.append(row["loss"])
            self.count = int(row.get("spikes", self.count))

    def add(self, loss: float) -> tuple[int, str]:
        """(spikes so far, how far this loss is above the recent ones; empty if it is none)."""
        above = ""
        if len(self._recent) >= 10:
            mean, deviation = statistics.fmean(self._recent), statistics.pstdev(self._recent)
            if loss - mean > self.threshold * deviation:
                self.count += 1
                above = f"above {mean:.3f} + {self.threshold:g} x {deviation:.3f} of those before"
        if np.isfinite(loss):
            self._recent.append(loss)
        return self.count, above
