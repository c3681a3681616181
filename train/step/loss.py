"""Token-level cross-entropy and its weighted mean."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models import Functional
from models.decoder import Constrain, identity
from sophia_optax import LinearLogits, softmax_cross_entropy
from train.step.batch import Batch

Outputs = Callable[..., Any]  # (params, batch, constrain=identity) -> logits or LinearLogits
OverRows = Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]


def outputs_of(model: Functional, chunk: int = 0) -> Outputs:
    """The model as a function of batches.

    Args:
      model: from `models.split`.
      chunk: positions whose logits are in memory at once; 0 for all, as one array.
    """

    def outputs(params: Any, batch: Batch, constrain: Constrain = identity):
        # Without it XLA shards the tokens of a group, and gathers a gradient of the table for each.
        inputs, named = jax.tree.map(constrain, (batch.inputs, model_inputs(batch)))
        if not chunk:
            return model.apply(params, inputs, constrain, **named)
        features = model.features(params, inputs, constrain, **named)
        if features.ndim == 2:  # of a classifier, whose logits are few
            return model.logits(params, features)
        return LinearLogits(features, *model.unembedding(params), chunk=chunk)

    return outputs


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Inputs of the model beside the tokens, by argument name."""
    named = {"segments_BxT": batch.segments, "types_BxT": batch.types}
    return {name: x for name, x in named.items() if x is not None}


def token_losses(outputs: Any, batch: Batch, over_rows: OverRows | None = None) -> jax.Array:
    """Unweighted cross-entropy of each target, in nats, float32 shaped as the targets.

    `over_rows` is `train.parallel.mesh.over_rows` of a mesh, for chunked logits outside any vmap.
    """
    if over_rows is None or not isinstance(outputs, LinearLogits):
        return softmax_cross_entropy(outputs, batch.targets)

    def losses(head, rows):
        features, targets = rows
        return softmax_cross_entropy(LinearLogits(features, *head, chunk=outputs.chunk), targets)

    return over_rows(losses)((outputs.matrix, outputs.bias), (outputs.features, batch.targets))


def mean_loss(outputs: Any, batch: Batch, over_rows: OverRows | None = None) -> jax.Array:
    """Mean over the targets of weight times loss, for a `normalized` batch.

    The mean over micro-batches of equal size is the mean of the whole batch.
    """
    losses = token_losses(outputs, batch, over_rows)
    return jnp.mean(losses if batch.weights is None else losses * batch.weights)


def normalized(batch: Batch) -> Batch:
    """The batch with weights of mean 1, so that `mean_loss` is the weighted mean.

    If all weights are 0 they stay 0, and so is the loss.
    """
    if batch.weights is None:
        return batch
    mean = jnp.mean(batch.weights)
    return batch._replace(weights=batch.weights / jnp.where(mean > 0, mean, 1))
