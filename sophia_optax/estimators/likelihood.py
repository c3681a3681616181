"""Likelihoods: draw labels from a model's outputs and differentiate the loss on them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.estimators.chunked_logits import LinearLogits, gradient_by_chunk
from sophia_optax.numerics import accumulation_dtype, widen

BLOCK = 128
"""Classes in a block of `sample_categorical`; vocabularies are padded to multiples of it."""


def check_variance(likelihood: str, variance: Any) -> None:
    """Rejects a variance that is not positive, or that the likelihood does not use."""
    checks.positive("variance", variance)
    if likelihood != "gaussian" and not (checks.known_number(variance) == 1):
        raise ValueError(
            f"variance={variance} belongs to likelihood='gaussian', not {likelihood!r}."
        )


# ---------------------------------------------------------------- gradients on sampled labels


def sampled_cotangent(
    likelihood: str, variance: float, key: jax.Array, rows: jax.Array, outputs: Any, weights: Any
) -> tuple[Any, jax.Array]:
    """(gradient of Σ sqrt(w) l by the outputs, B = Σ w); labels depend on the key and the row."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
    if isinstance(outputs, LinearLogits):
        return _cotangent_by_chunk(keys, outputs, weights)

    def sampled_loss(outputs):
        losses = jax.vmap(SAMPLED_LOSSES[likelihood])(keys, widen(outputs))
        roots, count = _roots(weights, losses.shape, losses.dtype)
        # A unit normal residual over sqrt(variance) is the gradient, whatever the variance.
        return jnp.sum(roots * losses) / jnp.sqrt(jnp.asarray(variance, losses.dtype)), count

    return jax.grad(sampled_loss, has_aux=True)(outputs)


def _cotangent_by_chunk(
    keys: jax.Array, logits: LinearLogits, weights: Any
) -> tuple[LinearLogits, jax.Array]:
    """`sampled_cotangent` of factored logits, with the labels that whole logits would get."""
    shape, dtype = logits.shape[:-1], accumulation_dtype(logits.features)
    roots, count = _roots(weights, shape, dtype)
    uniforms = jax.vmap(lambda key: _uniforms(key, shape[1:], dtype))(keys)

    def loss(logits, uniforms, roots):
        labels = _invert_softmax(uniforms, jax.lax.stop_gradient(logits))
        return jnp.sum(roots * optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return gradient_by_chunk(loss, logits, uniforms, roots), count


def _roots(weights: Any, shape: tuple[int, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(sqrt(w), Σ w); squaring the gradient of Σ sqrt(w) l restores the weight w."""
    if weights is None:
        return jnp.ones(shape, dtype), jnp.asarray(math.prod(shape), jnp.float32)
    if jnp.shape(weights) != shape:
        raise ValueError(
            f"`weights` has shape {jnp.shape(weights)}, but the outputs that count have shape "
            f"{shape} (for 'categorical' and 'gaussian' the logits' without the last axis)."
        )
    weights = jnp.asarray(weights, dtype)
    return jnp.sqrt(weights), jnp.sum(weights, dtype=accumulation_dtype(weights))


# ---------------------------------------------------------------- losses of one row


def _categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    labels = sample_categorical(key, jax.lax.stop_gradient(logits))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _bernoulli(key: jax.Array, logits: jax.Array) -> jax.Array:
    labels = jax.random.bernoulli(key, jax.nn.sigmoid(jax.lax.stop_gradient(logits)))
    return optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))


def _gaussian(key: jax.Array, outputs: jax.Array) -> jax.Array:
    labels = jax.lax.stop_gradient(outputs) + jax.random.normal(key, outputs.shape, outputs.dtype)
    return jnp.sum(optax.l2_loss(outputs, labels), axis=-1)


SAMPLED_LOSSES = {"categorical": _categorical, "bernoulli": _bernoulli, "gaussian": _gaussian}
"""Likelihood -> `(key, outputs) -> losses` on labels drawn from the outputs of one row."""


# ---------------------------------------------------------------- labels from a softmax


def sample_categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Labels drawn from softmax(logits): int32[...] for float[..., V].

    A label takes two uniform numbers, where `jax.random.categorical` draws one for each class: the
    first picks a block of classes, the second a class in the block. In float32 both resolve 2^-23,
    so the probability of a class is off by about (P + p / P) 2^-23, with p the probability of the
    class and P that of its block. A class of probability 0 is never drawn. If logits are not
    finite, the loss is not finite either.
    """
    return _invert_softmax(_uniforms(key, logits.shape[:-1], logits.dtype), logits)


def _uniforms(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """[..., 2] in [0, 1): all the randomness of labels of this shape."""
    return jnp.moveaxis(jax.random.uniform(key, (2, *shape), dtype), 0, -1)


def _invert_softmax(uniforms: jax.Array, logits: jax.Array) -> jax.Array:
    """int32[...] labels from [..., 2] uniform numbers."""
    classes = logits.shape[-1]
    block = min(BLOCK, classes)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -classes % block)]
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf)
    blocks = blocks.reshape(*logits.shape[:-1], -1, block)
    top = jnp.max(logits, -1, keepdims=True)
    chosen = _invert(uniforms[..., 0], jnp.sum(jnp.exp(blocks - top[..., None]), -1))
    # Index the logits, not their exponentials, so that the exponentials are never stored.
    inside = jnp.take_along_axis(blocks, chosen[..., None, None], -2)[..., 0, :]
    return chosen * block + _invert(uniforms[..., 1], jnp.exp(inside - top))


def _invert(u: jax.Array, masses: jax.Array) -> jax.Array:
    """The first class at which the cumulative distribution exceeds u, for u in [0, 1)."""
    cumulated = jnp.where(masses > 0, jnp.cumsum(masses, -1), 0)  # rounding may lift an empty class
    return jnp.argmax(cumulated > u[..., None] * jnp.max(cumulated, -1, keepdims=True), -1)
