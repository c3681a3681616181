"""Held-out loss, in nats a token and bits a byte, and for classes the share that is right."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from train import data
from train.step.loss import Outputs, token_losses


def make_evaluate(
    outputs: Outputs,
    loaded: Callable[[], data.Data],
    sharding: jax.sharding.Sharding,
    *,
    whole_text: bool = True,
) -> Callable[..., dict[str, float] | None]:
    """A function from parameters to what they reach on the held-out data, by default all of it.

    Args:
      outputs: the model, of `train.step.loss.outputs_of`.
      loaded: gives the data, when first called for.
      sharding: of a batch.
      whole_text: targets are all tokens of a text, so that its bits are theirs.

    Returns:
      `params -> {"heldout_loss": nats a target, ...}`: with "accuracy" where targets are classes,
      with "bits_per_byte" where they are all tokens of a text. `batches=n` reads only n batches,
      evenly spaced and the same each time. `stopped()` is asked before each batch: where it is true
      the result is None.
    """

    @jax.jit
    def add_up(params, batch):
        made = outputs(params, batch)
        losses, weights = token_losses(made, batch), batch.weights
        sums = [jnp.vdot(losses, weights), jnp.sum(weights)]
        if batch.targets.ndim == 1:
            sums.append(jnp.vdot(jnp.argmax(made, -1) == batch.targets, weights))
        return jnp.stack(sums)

    def place(batch):
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return data.to_mesh(
            lambda rows: jax.tree.map(lambda x: x[rows], batch), jax.tree.map(like, batch)
        )

    def evaluate(
        params, *, batches: int | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        total, late = np.zeros(()), np.zeros(())
        for batch in loaded().heldout(batches):
            if stopped():
                return None
            now = add_up(params, place(batch))
            # The host waits for the batch before: with more than 32 programs on their way, threads
            # of XLA on CPU wait for their turn that collectives of the earlier ones wait for.
            total, late = total + np.asarray(late, np.float64), now
        size = loaded().bytes_per_token if whole_text else None
        return _figures(total + np.asarray(late, np.float64), size)

    return evaluate


def _figures(sums: np.ndarray, bytes_per_token: float | None) -> dict[str, float]:
    loss = sums[0] / sums[1]
    if len(sums) == 3:
        return {"heldout_loss": loss, "accuracy": sums[2] / sums[1]}
    if bytes_per_token is None:
        return {"heldout_loss": loss}
    return {"heldout_loss": loss, "bits_per_byte": loss / bytes_per_token / math.log(2)}
