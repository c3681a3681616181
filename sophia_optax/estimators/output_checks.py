"""Checks of what the user's `logits_fn` and `loss_fn` return."""

from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax.estimators.chunked_logits import LinearLogits, check_factors
from sophia_optax.sharding import Tree

_ONE_LOGIT = (
    "`logits_fn` returned {}, one logit a row: a softmax over a single class is always 1, and its "
    "curvature is 0. For two classes with one logit pass "
    '`gauss_newton_bartlett(likelihood="bernoulli")`; for a regression likelihood="gaussian".'
)
_TOO_FEW_AXES = {
    "categorical": _ONE_LOGIT,
    "gaussian": "`logits_fn` returned {}, but 'gaussian' sums over the last axis, the outputs of a "
    "row. For one output a row return `outputs[:, None]`.",
    "bernoulli": "`logits_fn` returned {}, which has no batch axis. Return float[B, ...].",
}


def check_state_pair(result: Any) -> None:
    """Rejects a result that is not (outputs, state)."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(
            "with has_state=True `logits_fn` must return (outputs, state), but it returned "
            f"{jax.tree.map(jnp.shape, result)}."
        )


def check_outputs(outputs: Any, likelihood: str, numbers: jax.Array | None) -> None:
    """Rejects outputs that are not one array, or factored logits, in the likelihood's form."""
    rank = 1 if likelihood == "bernoulli" else 2
    linear = isinstance(outputs, LinearLogits)
    if linear and likelihood != "categorical":
        raise ValueError(
            "`logits_fn` returned LinearLogits, which serve likelihood 'categorical' only, not "
            f"{likelihood!r}. Return the product as an array."
        )
    if linear:
        check_factors(outputs)
    rows = "B" if numbers is None else len(numbers)
    shapes = outputs.shape if linear else jax.tree.map(jnp.shape, outputs)
    array = linear or isinstance(outputs, jax.Array)
    if not array or not shapes or rows not in ("B", shapes[0]):
        raise ValueError(
            f"`logits_fn` must return one array, float[{rows}, ..., V] with the rows of `inputs` "
            f"first, but it returned {shapes}. Drop auxiliary outputs, and do not merge the batch "
            "axis with another. (With a new state beside the outputs, call "
            "`value_grad_and_hessian(estimator, has_state=True)`.)"
        )
    if len(shapes) < rank or (likelihood == "categorical" and shapes[-1] < 2):
        raise ValueError(_TOO_FEW_AXES[likelihood].format(shapes))


def check_losses(result: Any, rows: int, weights: Any, has_aux: bool) -> tuple[jax.Array, Tree]:
    """(losses, auxiliary output) from the result of `loss_fn`, or a ValueError."""
    pair = isinstance(result, tuple) and len(result) == 2
    losses, aux = result if pair and has_aux else (result, None)
    if pair != has_aux or not isinstance(losses, jax.Array) or losses.shape[:1] != (rows,):
        form = "(losses, auxiliary output) with losses" if has_aux else "losses"
        raise ValueError(
            f"with has_aux={has_aux} `loss_fn` must return {form} float[{rows}, ...], but it "
            f"returned {jax.tree.map(jnp.shape, result)}. Do not average them: groups of rows may "
            "have unequal `weights`, so the weighted mean is taken afterwards."
        )
    if weights is not None and losses.shape != jnp.shape(weights):
        raise ValueError(
            f"`loss_fn` returned losses of shape {losses.shape}, but `weights` has shape "
            f"{jnp.shape(weights)}. Return one loss for each weight."
        )
    return losses, aux
