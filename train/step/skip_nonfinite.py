"""Steps whose loss or gradient is not finite change nothing."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


def if_finite(
    update: Callable[[State, Any], State], state: State, grads: Any, *measures: jax.Array
) -> tuple[State, jax.Array]:
    """`update(state, grads)` where all scalars `measures` are finite, else `state` itself.

    The update, down to the new parameters, is inside of a branch: XLA fuses it as it would alone,
    and writes over donated buffers. A choice between old and new arrays behind it
    (`jnp.where`) costs 12 bytes a parameter or more, and temporaries of the size of the model.

    Args:
      update: makes the new state, of the same shapes; for example of parameters and optimizer.
      state: what is kept where something is not finite: every counter in it stands still.
      grads: passed to `update`.
      *measures: the loss and the norm of the gradient: one value in it that is not finite, or
        squares that overflow, make the norm so.

    Returns:
      (state, float32 scalar: 1 where the update was left out).
    """
    finite = jnp.all(jnp.isfinite(jnp.stack(measures)))
    state = jax.lax.cond(finite, update, lambda state, grads: state, state, grads)
    return state, 1 - finite.astype(jnp.float32)
