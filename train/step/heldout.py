"""Held-out loss in nats per token and bits per byte, and accuracy of classifiers."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from train import data
from train.parallel import mesh
from train.step.loss import Outputs, token_losses


def make_evaluate(
    outputs: Outputs,
    loaded: Callable[[], data.Data],
    sharding: jax.sharding.Sharding,
    *,
    whole_text: bool = True,
) -> Callable[..., dict[str, float] | None]:
    """A function from parameters to their loss on the held-out data, by default on all of it.

    Args:
      outputs: the model as a function of batches: `train.step.loss.outputs_of`.
      loaded: returns the data; called at the first evaluation.
      sharding: of a batch.
      whole_text: the targets are all tokens of a text, so that bits per byte have a meaning.

    Returns:
      `params -> {"heldout_loss": nats per target, ...}`: with "accuracy" if targets are classes,
      with "bits_per_byte" if `whole_text`. `batches=n` reads only n batches, evenly spaced and the
      same each time. `stopped()` is called before each batch: if it is true the result is None.
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
            # Wait for the previous batch: with more than 32 programs in flight XLA's CPU thread
            # pool can deadlock on collectives.
            total, late = total + np.asarray(late, np.float64), now
        size = loaded().bytes_per_token if whole_text else None
        return _figures(total + np.asarray(late, np.float64), size)

    return evaluate


def on_mesh(
    outputs: Outputs, placed: Mesh, loaded: Callable[[], data.Data], *, whole_text: bool
) -> Callable[..., dict[str, float] | None]:
    """`make_evaluate` of a model whose activations and batches are sharded over a mesh."""
    sharded = functools.partial(outputs, constrain=mesh.constrain_activations(placed))
    return make_evaluate(sharded, loaded, mesh.batch_sharding(placed), whole_text=whole_text)


def _figures(sums: np.ndarray, bytes_per_token: float | None) -> dict[str, float]:
    loss = sums[0] / sums[1]
    if len(sums) == 3:
        return {"heldout_loss": loss, "accuracy": sums[2] / sums[1]}
    if bytes_per_token is None:
        return {"heldout_loss": loss}
    return {"heldout_loss": loss, "bits_per_byte": loss / bytes_per_token / math.log(2)}
