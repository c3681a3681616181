"""One forward pass over some rows: losses on labels drawn from the model, and on the true ones."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.estimators.chunked_logits import LinearLogits, check_factors, gradient_by_chunk
from sophia_optax.numerics import accumulation_dtype, widen
from sophia_optax.sharding import Spec, Tree, spec_of, with_auto_axes

Outputs = jax.Array | LinearLogits

BLOCK = 128
"""Classes in a block of `sample_categorical`; vocabularies are padded to multiples of it."""


class Model(NamedTuple):
    """What is evaluated on a group of rows."""

    likelihood: str
    logits_fn: Any
    named: Callable[[Any], None]
    """Refuses outputs that differ over an axis that is not named."""
    variance: float = 1.0
    has_state: bool = False
    """`logits_fn` returns (outputs, new state of the model)."""
    loss_fn: Any = None
    """The true loss of each output, if it is wanted."""
    has_aux: bool = False
    """`loss_fn` returns (losses, auxiliary output)."""


class Pass(NamedTuple):
    """What one forward pass over a group of rows gives."""

    draw: Callable[[jax.Array], tuple[Tree, jax.Array]]
    """key -> (gradient of the summed loss on sampled labels, B)."""
    true: tuple[jax.Array, jax.Array, Tree] | None = None
    """(mean of w l, mean of w, gradient of the first), on true labels."""
    aux: Tree = None
    state: Tree = None
    """The model's new state."""


def check_variance(likelihood: str, variance: Any) -> None:
    """Refuses a variance that is not above 0, or that the likelihood has no use for."""
    checks.positive("variance", variance)
    if likelihood != "gaussian" and not (checks.known_number(variance) == 1):
        raise ValueError(
            f"variance={variance} belongs to likelihood='gaussian', not {likelihood!r}."
        )


def user_pass(
    sampled_loss_fn: Callable, weights: Any, named: Callable[[Any], None]
) -> Callable[[Tree, Tree], Pass]:
    """`(params, (inputs, weights, row numbers)) -> Pass` where the user draws the labels."""
    if weights is not None:
        raise ValueError(
            "`weights` go with `logits_fn`; a `sampled_loss_fn` weighs its own outputs, each "
            "cotangent times sqrt(w). Pass them inside `inputs`."
        )

    def loss(params, inputs, key):
        loss, count = sampled_loss_fn(params, inputs, key)
        named(loss)
        return loss, jnp.asarray(count, jnp.float32)

    def forward(params, rows):
        inputs, _, numbers = rows

        def draw(key):
            key = key if numbers is None else jax.random.fold_in(key, numbers[0])
            return jax.grad(loss, has_aux=True)(params, inputs, key)

        return Pass(draw)

    return forward


def logits_pass(model: Model) -> Callable[[Tree, Tree], Pass]:
    """`(params, (inputs, weights, row numbers)) -> Pass`; `true` needs a `loss_fn`."""
    checks.given(
        "gauss_newton_bartlett",
        "logits_fn",
        model.logits_fn,
        "Pass `logits_fn=lambda params: model(params, batch)`, the outputs before the loss "
        "(or `sampled_loss_fn`).",
    )

    def forward(params, rows):
        inputs, weights, numbers = rows
        outputs_of = _outputs_of(model, inputs, numbers)
        outputs, pullback, state = jax.vjp(outputs_of, params, has_aux=True)

        def draw(key):
            rows = jnp.arange(outputs.shape[0]) if numbers is None else numbers
            specs = jax.tree.map(spec_of, outputs), Spec()
            cotangent_of = functools.partial(_cotangent, model.likelihood, model.variance)
            cotangent, count = with_auto_axes(
                cotangent_of, key, rows, outputs, weights, specs=specs
            )
            return pullback(cotangent)[0], count

        if model.loss_fn is None:
            return Pass(draw)

        true_loss = _true_loss(model.loss_fn, inputs, weights, model.has_aux)
        (loss, (weight, aux)), cotangent = jax.value_and_grad(true_loss, has_aux=True)(outputs)
        gradient = jax.tree.map(widen, pullback(cotangent)[0])
        return Pass(draw, (loss, weight, gradient), aux, state)

    return forward


def _cotangent(
    likelihood: str, variance: float, key: jax.Array, rows: jax.Array, outputs: Any, weights: Any
) -> tuple[Any, jax.Array]:
    """(gradient of Σ sqrt(w) l, Σ w) on labels that are functions of the key and the row."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
    if isinstance(outputs, LinearLogits):
        return _gradient_by_chunk(keys, outputs, weights)

    def sampled_loss(outputs):
        losses = jax.vmap(SAMPLED_LOSSES[likelihood])(keys, widen(outputs))
        roots, count = _roots(weights, losses.shape, losses.dtype)
        # A unit normal residual over sqrt(variance) is the gradient, whatever the variance.
        return jnp.sum(roots * losses) / jnp.sqrt(jnp.asarray(variance, losses.dtype)), count

    return jax.grad(sampled_loss, has_aux=True)(outputs)


def gradient_pass(
    model: Model,
) -> Callable[[Tree, Tree], tuple[tuple[jax.Array, jax.Array, Tree], tuple[Tree, Tree]]]:
    """`(params, (inputs, weights, row numbers)) -> (true, (aux, state))`, sampling nothing."""

    def forward(params, rows):
        inputs, weights, numbers = rows
        outputs_of = _outputs_of(model, inputs, numbers)
        true_loss = _true_loss(model.loss_fn, inputs, weights, model.has_aux)

        def objective(params):
            outputs, state = outputs_of(params)
            loss, (weight, aux) = true_loss(outputs)
            return loss, (weight, aux, state)

        value, gradient = jax.value_and_grad(objective, has_aux=True)(params)
        loss, (weight, aux, state) = value
        return (loss, weight, jax.tree.map(widen, gradient)), (aux, state)

    return forward


def _outputs_of(
    model: Model, inputs: Tree, numbers: jax.Array | None
) -> Callable[[Tree], tuple[Outputs, Tree]]:
    """`params -> (outputs, state)`, of the form that the likelihood has."""
    arguments = () if inputs is None else (inputs,)

    def outputs_of(params):
        result, state = model.logits_fn(params, *arguments), None
        if model.has_state:
            if not isinstance(result, tuple) or len(result) != 2:
                raise ValueError(
                    "with has_state=True `logits_fn` must return (outputs, state), but it returned "
                    f"{jax.tree.map(jnp.shape, result)}."
                )
            result, state = result
        _check_outputs(result, model.likelihood, numbers)
        model.named(result)
        return result, state

    return outputs_of


def _true_loss(
    loss_fn: Callable, inputs: Tree, weights: Any, has_aux: bool
) -> Callable[[Outputs], tuple[jax.Array, tuple[jax.Array, Tree]]]:
    """`outputs -> (mean of w l, (mean of w, auxiliary output))`."""
    arguments = () if inputs is None else (inputs,)

    def true_loss(outputs):
        losses, aux = _losses(loss_fn(outputs, *arguments), outputs.shape[0], weights, has_aux)
        loss, weight = _weighted_mean(widen(losses), weights)
        return loss, (weight, aux)

    return true_loss


def _check_outputs(outputs: Any, likelihood: str, numbers: jax.Array | None) -> None:
    rank = 1 if likelihood == "bernoulli" else 2
    linear = isinstance(outputs, LinearLogits)
    if linear and likelihood != "categorical":
        raise ValueError(
            f"`logits_fn` returned LinearLogits, of which only labels of likelihood 'categorical' "
            f"are drawn, not of {likelihood!r}. Return the product as an array."
        )
    if linear:
        check_factors(outputs)
    rows = "B" if numbers is None else len(numbers)
    shapes = outputs.shape if linear else jax.tree.map(jnp.shape, outputs)
    array = linear or isinstance(outputs, jax.Array)
    if not array or not shapes or rows not in ("B", shapes[0]):
        raise ValueError(
            f"`logits_fn` must return one array, float[{rows}, ..., V] with the rows of `inputs` "
            f"first, but it returned {shapes}. Drop auxiliary outputs; keep the batch axis apart. "
            "(`value_grad_and_hessian(estimator, has_state=True)` takes a new state beside it.)"
        )
    if len(shapes) < rank or (likelihood == "categorical" and shapes[-1] < 2):
        raise ValueError(_WITHOUT_CLASSES[likelihood].format(shapes))


_ONE_LOGIT = (
    "`logits_fn` returned {}, one logit a row: a softmax over a single class is always 1, and its "
    "curvature 0. For two classes by one logit pass "
    '`gauss_newton_bartlett(likelihood="bernoulli")`; for a regression likelihood="gaussian".'
)
_WITHOUT_CLASSES = {
    "categorical": _ONE_LOGIT,
    "gaussian": "`logits_fn` returned {}, but 'gaussian' sums over the last axis, the outputs of a "
    "row. For one output a row return `outputs[:, None]`.",
    "bernoulli": "`logits_fn` returned {}, which has no batch axis. Return float[B, ...].",
}


def _losses(result: Any, rows: int, weights: Any, has_aux: bool) -> tuple[jax.Array, Tree]:
    """(losses, auxiliary output) of what `loss_fn` returned."""
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


def _roots(weights: Any, shape: tuple[int, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(sqrt(w), Σ w) of losses: squaring the gradient of Σ sqrt(w) l restores the weight w."""
    if weights is None:
        return jnp.ones(shape, dtype), jnp.asarray(math.prod(shape), jnp.float32)
    if jnp.shape(weights) != shape:
        raise ValueError(
            f"`weights` has shape {jnp.shape(weights)}, but the outputs that count have shape "
            f"{shape} (for 'categorical' and 'gaussian' the logits' without the last axis)."
        )
    weights = jnp.asarray(weights, dtype)
    return jnp.sqrt(weights), jnp.sum(weights, dtype=accumulation_dtype(weights))


def _weighted_mean(losses: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array]:
    """(mean of w l, mean of w); summed over equal groups, their ratio is the mean loss.

    Means, since the gradient of a sum may overflow in float16.
    """
    if weights is None:
        return jnp.mean(losses), jnp.ones([], losses.dtype)
    weights = jnp.asarray(weights, losses.dtype)
    return jnp.mean(weights * losses), jnp.mean(weights)


def sample_categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Labels drawn from softmax(logits), int32[...] for float[..., V].

    Two uniform numbers a label, where `jax.random.categorical` draws one a class: the first picks
    a block of classes, the second a class in it. Both resolve 2^-23 in float32, so a class of
    probability p in a block of probability P has an error of about (P + p / P) 2^-23. A class of
    probability 0 is never drawn; where logits are not finite, neither is the loss.
    """
    return _invert_softmax(_uniforms(key, logits.shape[:-1], logits.dtype), logits)


def _uniforms(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """[..., 2] in [0, 1): all that is random in labels of that shape."""
    return jnp.moveaxis(jax.random.uniform(key, (2, *shape), dtype), 0, -1)


def _invert_softmax(uniforms: jax.Array, logits: jax.Array) -> jax.Array:
    """int32[...] labels at [..., 2] uniform numbers."""
    classes = logits.shape[-1]
    block = min(BLOCK, classes)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -classes % block)]
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf)
    blocks = blocks.reshape(*logits.shape[:-1], -1, block)
    top = jnp.max(logits, -1, keepdims=True)
    chosen = _invert(uniforms[..., 0], jnp.sum(jnp.exp(blocks - top[..., None]), -1))
    # Of the logits, not of their exponentials: those are then never stored.
    inside = jnp.take_along_axis(blocks, chosen[..., None, None], -2)[..., 0, :]
    return chosen * block + _invert(uniforms[..., 1], jnp.exp(inside - top))


def _invert(u: jax.Array, masses: jax.Array) -> jax.Array:
    """The class at which the distribution function exceeds u, which is in [0, 1)."""
    cumulated = jnp.where(masses > 0, jnp.cumsum(masses, -1), 0)  # rounding may lift an empty class
    return jnp.argmax(cumulated > u[..., None] * jnp.max(cumulated, -1, keepdims=True), -1)


def _categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    labels = sample_categorical(key, jax.lax.stop_gradient(logits))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _gradient_by_chunk(
    keys: jax.Array, logits: LinearLogits, weights: Any
) -> tuple[LinearLogits, jax.Array]:
    """(gradient of Σ sqrt(w) l, Σ w) on the labels that the rows' keys draw from whole logits."""
    shape, dtype = logits.shape[:-1], accumulation_dtype(logits.features)
    roots, count = _roots(weights, shape, dtype)
    uniforms = jax.vmap(lambda key: _uniforms(key, shape[1:], dtype))(keys)

    def loss(logits, uniforms, roots):
        labels = _invert_softmax(uniforms, jax.lax.stop_gradient(logits))
        return jnp.sum(roots * optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return gradient_by_chunk(loss, logits, uniforms, roots), count


def _bernoulli(key: jax.Array, logits: jax.Array) -> jax.Array:
    labels = jax.random.bernoulli(key, jax.nn.sigmoid(jax.lax.stop_gradient(logits)))
    return optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))


def _gaussian(key: jax.Array, outputs: jax.Array) -> jax.Array:
    labels = jax.lax.stop_gradient(outputs) + jax.random.normal(key, outputs.shape, outputs.dtype)
    return jnp.sum(optax.l2_loss(outputs, labels), axis=-1)


SAMPLED_LOSSES = {"categorical": _categorical, "bernoulli": _bernoulli, "gaussian": _gaussian}
