"""When a run has a checkpoint, and that a good one is never pushed out by a bad one."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from train import program
from train.checkpoint import leaves, manifest, store
from train.config import serialize
from train.config.schema import Config
from train.logging.throughput import Meter
from train.parallel import processes
from train.step.train_step import TrainState


class Saver:
    """When there is a checkpoint: by steps, by minutes, and at the end."""

    def __init__(
        self,
        config: Config,
        programs: program.Program,
        checkpoints: store.Checkpoints,
        meter: Meter,
    ):
        self.config, self.programs, self.checkpoints, self.meter = (
            config,
            programs,
            checkpoints,
            meter,
        )
        self.clock = time.perf_counter()
        self.stale = -1  # up to this step `overdue` was raised before the last save

    def overdue(self) -> bool:
        """By the clock of this process."""
        minutes = self.config.output.checkpoint_minutes
        return minutes > 0 and time.perf_counter() - self.clock > 60 * minutes

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        overdue: bool = False,
        last: bool = False,
    ) -> None:
        """Saves a state that is due, after the metrics that led to it.

        Raises:
          FloatingPointError: parameters, or what the optimizer keeps, are not finite. Such a state
            must never push a good one out, and no later step can mend it.
        """
        due = step % self.config.output.checkpoint_every == 0
        if not (due or (overdue and step > self.stale) or last):
            return
        self.meter.flush()
        if bad := _not_finite(state):
            raise FloatingPointError(
                f"{bad} is not finite at step {step}, which is not saved. Lower "
                f"--optim.learning-rate, or lengthen --warmup-steps; {self._kept()}."
            )
        self.meter.log.sync()
        settings, health = serialize.to_json(self.config), self.meter.health
        beside = manifest.make(step, settings, self.programs.data().fingerprint, health)
        self.checkpoints.save(step, state, record=beside, force=True)
        self.clock, self.stale = time.perf_counter(), step + processes.late()

    def _kept(self) -> str:
        latest = self.checkpoints.latest
        return "nothing was saved yet" if latest is None else f"step {latest} is kept"


def wrong_here(step: int, state: Any) -> str:
    """What is wrong with this process's part of the state of a step; it waits for no other.

    Args:
      step: that the checkpoint is named after.
      state: `TrainState`, or a dict of some of its fields.
    """
    found = int(state["step"] if isinstance(state, dict) else state.step)
    if found != step:
        return f"it holds the state of step {found}"
    shards = {
        name: [s.data for s in x.addressable_shards if s.replica_id == 0]
        for name, x in leaves.floats(state).items()
    }
    bad = [name for name, data in shards.items() if not all(map(_finite, data))]
    return f"{bad[0]} is not finite, and such are never saved" if bad else ""


def _not_finite(state: TrainState) -> str:
    """The name of an array that is not; no optimizer keeps infinite values on purpose."""
    floats = leaves.floats(state)
    bad = [name for name, sound in _all_finite(floats).items() if not bool(sound)]
    return bad[0] if bad else ""


@jax.jit
def _all_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.all(jnp.isfinite(x)) for name, x in arrays.items()}


def _finite(array: jax.Array) -> bool:
    return bool(_all_finite({"": array})[""])
