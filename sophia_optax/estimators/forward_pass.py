"""One forward pass over some rows: gradients on sampled labels and on the true ones."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sophia_optax import checks
from sophia_optax.estimators.chunked_logits import LinearLogits
from sophia_optax.estimators.likelihood import sampled_cotangent
from sophia_optax.estimators.output_checks import check_losses, check_outputs, check_state_pair
from sophia_optax.estimators.rows import Rows
from sophia_optax.numerics import widen
from sophia_optax.sharding import Spec, Tree, spec_of, with_auto_axes

Outputs = jax.Array | LinearLogits
LossAndGradient = tuple[jax.Array, jax.Array, Tree]
"""(mean of w l, mean of w, gradient of the first), on true labels."""


class Model(NamedTuple):
    """The model and the losses that a pass evaluates."""

    likelihood: str
    logits_fn: Any
    check_axes: Callable[[Any], None]
    """Rejects outputs that differ over a manual axis that `axis_name` does not name."""
    variance: float = 1.0
    has_state: bool = False
    """`logits_fn` returns (outputs, new state of the model)."""
    loss_fn: Any = None
    """The true loss of each output, or None if it is not wanted."""
    has_aux: bool = False
    """`loss_fn` returns (losses, auxiliary output)."""


class Pass(NamedTuple):
    """The result of one forward pass."""

    sample_gradient: Callable[[jax.Array], tuple[Tree, jax.Array]]
    """key -> (gradient of the summed loss on sampled labels, B)."""
    loss_and_gradient: LossAndGradient | None = None
    aux: Tree = None
    state: Tree = None
    """The model's new state."""


def user_pass(
    sampled_loss_fn: Callable, weights: Any, check_axes: Callable[[Any], None]
) -> Callable[[Tree, Rows], Pass]:
    """`(params, rows) -> Pass` for a loss whose labels the user draws."""
    if weights is not None:
        raise ValueError(
            "`weights` go with `logits_fn`; a `sampled_loss_fn` weighs its own outputs, each "
            "cotangent times sqrt(w). Pass them inside `inputs`."
        )

    def loss(params, inputs, key):
        loss, count = sampled_loss_fn(params, inputs, key)
        check_axes(loss)
        return loss, jnp.asarray(count, jnp.float32)

    def forward(params, rows):
        inputs, _, numbers = rows

        def sample_gradient(key):
            key = key if numbers is None else jax.random.fold_in(key, numbers[0])
            return jax.grad(loss, has_aux=True)(params, inputs, key)

        return Pass(sample_gradient)

    return forward


def logits_pass(model: Model) -> Callable[[Tree, Rows], Pass]:
    """`(params, rows) -> Pass`, with loss and gradient if the model has a `loss_fn`."""
    checks.given(
        "gauss_newton_bartlett",
        "logits_fn",
        model.logits_fn,
        "Pass `logits_fn=lambda params: model(params, batch)`, the outputs before the loss "
        "(or `sampled_loss_fn`).",
    )

    def forward(params, rows):
        outputs, pullback, state = jax.vjp(_outputs_of(model, rows), params, has_aux=True)
        sample_gradient = functools.partial(_sample_gradient, model, rows, outputs, pullback)
        if model.loss_fn is None:
            return Pass(sample_gradient)
        true_loss = _true_loss(model, rows)
        (loss, (weight, aux)), cotangent = jax.value_and_grad(true_loss, has_aux=True)(outputs)
        gradient = jax.tree.map(widen, pullback(cotangent)[0])
        return Pass(sample_gradient, (loss, weight, gradient), aux, state)

    return forward


def gradient_pass(
    model: Model,
) -> Callable[[Tree, Rows], tuple[LossAndGradient, tuple[Tree, Tree]]]:
    """`(params, rows) -> (loss and gradient, (aux, state))`, which samples nothing."""

    def forward(params, rows):
        outputs_of, true_loss = _outputs_of(model, rows), _true_loss(model, rows)

        def objective(params):
            outputs, state = outputs_of(params)
            loss, (weight, aux) = true_loss(outputs)
            return loss, (weight, aux, state)

        value, gradient = jax.value_and_grad(objective, has_aux=True)(params)
        loss, (weight, aux, state) = value
        return (loss, weight, jax.tree.map(widen, gradient)), (aux, state)

    return forward


def _sample_gradient(
    model: Model, rows: Rows, outputs: Outputs, pullback: Callable, key: jax.Array
) -> tuple[Tree, jax.Array]:
    """(gradient of the summed loss on labels drawn with the key, B)."""
    numbers = jnp.arange(outputs.shape[0]) if rows.numbers is None else rows.numbers
    specs = jax.tree.map(spec_of, outputs), Spec()
    cotangent_of = functools.partial(sampled_cotangent, model.likelihood, model.variance)
    cotangent, count = with_auto_axes(
        cotangent_of, key, numbers, outputs, rows.weights, specs=specs
    )
    return pullback(cotangent)[0], count


def _outputs_of(model: Model, rows: Rows) -> Callable[[Tree], tuple[Outputs, Tree]]:
    """`params -> (outputs, state)`, with outputs of the form that the likelihood needs."""
    arguments = () if rows.inputs is None else (rows.inputs,)

    def outputs_of(params):
        result, state = model.logits_fn(params, *arguments), None
        if model.has_state:
            check_state_pair(result)
            result, state = result
        check_outputs(result, model.likelihood, rows.numbers)
        model.check_axes(result)
        return result, state

    return outputs_of


def _true_loss(
    model: Model, rows: Rows
) -> Callable[[Outputs], tuple[jax.Array, tuple[jax.Array, Tree]]]:
    """`outputs -> (mean of w l, (mean of w, auxiliary output))`."""
    arguments = () if rows.inputs is None else (rows.inputs,)

    def true_loss(outputs):
        result = model.loss_fn(outputs, *arguments)
        losses, aux = check_losses(result, outputs.shape[0], rows.weights, model.has_aux)
        loss, weight = _weighted_mean(widen(losses), rows.weights)
        return loss, (weight, aux)

    return true_loss


def _weighted_mean(losses: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array]:
    """(mean of w l, mean of w); summed over equal groups, their ratio is the mean loss.

    Both are means because the gradient of a sum may overflow in float16.
    """
    if weights is None:
        return jnp.mean(losses), jnp.ones([], losses.dtype)
    weights = jnp.asarray(weights, losses.dtype)
    return jnp.mean(weights * losses), jnp.mean(weights)
