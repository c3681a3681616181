"""Whether a state may be saved, and whether a state that was read is the one that was saved."""

from typing import Any

import jax
import jax.numpy as jnp

from train.checkpoint import leaves


def nonfinite_leaf(state: Any) -> str:
    """The name of an array with a value that is not finite; empty without one.

    No optimizer keeps infinite values on purpose.
    """
    floats = leaves.floats(state)
    bad = [name for name, sound in _all_finite(floats).items() if not bool(sound)]
    return bad[0] if bad else ""


def problem(step: int, state: Any) -> str:
    """What is wrong with this process's shards of a state; empty if nothing. Waits for no other.

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
    return f"{bad[0]} is not finite, and no such state is ever saved" if bad else ""


@jax.jit
def _all_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.all(jnp.isfinite(x)) for name, x in arrays.items()}


def _finite(array: jax.Array) -> bool:
    return bool(_all_finite({"": array})[""])
