"""Held-out loss, in nats a token and bits a byte."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import data
from train.step import Apply, token_losses


def make_evaluate(
    apply: Apply, batches: Callable[[], Any], sharding: jax.sharding.Sharding, **kwargs: Any
) -> Callable[[Any], dict[str, float]]:
    """A function from parameters to the loss on a whole held-out text.

    Args:
      apply: the model.
      batches: makes an iterator of (int32[B, T + 1], float32[B]), such as
        `lambda: data.heldout_batches(...)`.
      sharding: of a batch.
      **kwargs: passed to `apply`.

    Returns:
      `params -> {"heldout_loss": nats a token, "bits_per_byte": bits}`; tokens are bytes.
    """

    @jax.jit
    def add(total, params, batch, weights):
        losses = jnp.sum(token_losses(apply, params, batch, **kwargs), axis=1)
        tokens = jnp.sum(weights) * (batch.shape[1] - 1)
        return total + jnp.stack([jnp.vdot(losses, weights), tokens])

    def place(array):
        return data.to_mesh(lambda rows: array[rows], array.shape, sharding)

    def evaluate(params) -> dict[str, float]:
        sums = jnp.zeros(2)  # one waits for the other: batches do not pile up on the devices
        for rows, weights in batches():
            sums = add(sums, params, place(rows), place(weights))
        total, tokens = np.asarray(sums, np.float64)
        return {"heldout_loss": total / tokens, "bits_per_byte": total / tokens / math.log(2)}

    return evaluate
