"""Held-out loss, in nats a token and bits a byte, and for classes the share that is right."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import data
from train.loss import Outputs, token_losses


def make_evaluate(
    outputs: Outputs,
    loaded: Callable[[], data.Data],
    sharding: jax.sharding.Sharding,
    *,
    whole_text: bool = True,
) -> Callable[[Any], dict[str, float]]:
    """A function from parameters to what they reach on the whole held-out data.

    Args:
      outputs: the model, of `train.loss.outputs_of`.
      loaded: gives the data, when first called for.
      sharding: of a batch.
      whole_text: targets are all tokens of a text, so that its bits are theirs.

    Returns:
      `params -> {"heldout_loss": nats a target, ...}`: with "accuracy" where targets are classes,
      with "bits_per_byte" where they are all tokens of a text.
    """

    @jax.jit
    def add(total, params, batch):
        made = outputs(params, batch)
        losses, weights = token_losses(made, batch), batch.weights
        sums = [jnp.vdot(losses, weights), jnp.sum(weights)]
        if batch.targets.ndim == 1:
            sums.append(jnp.vdot(jnp.argmax(made, -1) == batch.targets, weights))
        return total + jnp.stack(sums)

    def place(array):
        return data.to_mesh(lambda rows: array[rows], array.shape, sharding)

    def evaluate(params) -> dict[str, float]:
        sums = None  # one waits for the other: batches do not pile up on the devices
        for batch in loaded().heldout():
            classes = batch.targets.ndim == 1
            sums = jnp.zeros(3 if classes else 2) if sums is None else sums
            sums = add(sums, params, jax.tree.map(place, batch))
        size = loaded().bytes_per_token if whole_text else None
        return _figures(np.asarray(sums, np.float64), size)

    return evaluate


def _figures(sums: np.ndarray, bytes_per_token: float | None) -> dict[str, float]:
    loss = sums[0] / sums[1]
    if len(sums) == 3:
        return {"heldout_loss": loss, "accuracy": sums[2] / sums[1]}
    if bytes_per_token is None:
        return {"heldout_loss": loss}
    return {"heldout_loss": loss, "bits_per_byte": loss / bytes_per_token / math.log(2)}
