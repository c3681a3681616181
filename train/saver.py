"""When a run has a checkpoint, and that a good one is never pushed out by a bad one."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from train import checkpoint, config, distributed, program, record
from train.config import Config
from train.meter import Meter
from train.step import TrainState


class Saver:
    """When there is a checkpoint: by steps, by minutes, and at the end."""

    def __init__(
        self,
        run: Config,
        programs: program.Program,
        checkpoints: checkpoint.Checkpoints,
        meter: Meter,
    ):
        self.run, self.programs, self.checkpoints, self.meter = run, programs, checkpoints, meter
        self.clock = time.perf_counter()
        self.stale = -1  # up to this step `overdue` was raised before the last save

    def overdue(self) -> bool:
        """By the clock of this process."""
        minutes = self.run.run.checkpoint_minutes
        return minutes > 0 and time.perf_counter() - self.clock > 60 * minutes

    def save(
        self,
        step: int,
        state: TrainState,
        heldout: dict[str, float],
        *,
        overdue: bool = False,
        last: bool = False,
    ) -> None:
        """Saves a state that is due, after the metrics that led to it.

        Raises:
          FloatingPointError: parameters are not finite. Such a state must never push a good one
            out, and no later step can mend it.
        """
        due = step % self.run.run.checkpoint_every == 0
        if not (due or (overdue and step > self.stale) or last):
            return
        self.meter.flush()
        if not bool(_finite(state.params)):
            raise FloatingPointError(
                f"parameters are not finite at step {step}, which is not saved. Lower "
                f"--optim.learning-rate, or lengthen --warmup-steps; {self._kept()}."
            )
        self.meter.log.sync()
        settings, health = config.to_json(self.run), self.meter.health
        beside = record.make(step, settings, self.programs.data().fingerprint, health)
        self.checkpoints.save(step, state, metrics=heldout or None, record=beside, force=True)
        self.clock, self.stale = time.perf_counter(), step + distributed.late()

    def _kept(self) -> str:
        latest = self.checkpoints.latest
        return "nothing was saved yet" if latest is None else f"step {latest} is kept"


def finite_here(params: Any) -> bool:
    """Whether what this process holds of the parameters is finite; it waits for no other."""
    shards = (s for x in jax.tree.leaves(params) for s in x.addressable_shards)
    return all(bool(_finite(s.data)) for s in shards if s.replica_id == 0)


@jax.jit
def _finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
