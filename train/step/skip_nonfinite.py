"""Skip the update of a step with a non-finite loss or gradient."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


def if_finite(
    update: Callable[[State, Any], State], state: State, grads: Any, *measures: jax.Array
) -> tuple[State, jax.Array]:
    """`update(state, grads)` if all scalars `measures` are finite, else `state`.

    The whole update is inside a branch: XLA fuses it as it would alone, and reuses donated buffers.
    Selecting between old and new arrays after the update (`jnp.where`) would cost 12 bytes a
    parameter or more, and temporaries of the size of the model.

    Args:
      update: returns the new state, for example parameters and optimizer state.
      state: stays as it is, with its counters, if a measure is not finite.
      grads: passed to `update`.
      *measures: the loss and the norm of the gradient. The norm is not finite if any value of the
        gradient is not, or if its squares overflow.

    Returns:
      (state, float32 scalar: 1 if the update was skipped)
    """
    finite = jnp.all(jnp.isfinite(jnp.stack(measures)))
    state = jax.lax.cond(finite, update, lambda state, grads: state, state, grads)
    return state, 1 - finite.astype(jnp.float32)
