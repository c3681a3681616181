"""BERT's heads, and the tokens that it is trained to name."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_families import MASKED, apply_of, noisy_params, shapes_of, tokens_of

from models import mask_tokens, split

CLASSES = dataclasses.replace(MASKED, classes=3)
MASK = 30


def masked(key, tokens, **arguments):
    return mask_tokens(key, tokens, **({"mask_token": MASK, "vocab_size": 31} | arguments))


def test_logits_are_of_tokens_or_of_classes():
    tokens = tokens_of(MASKED)
    assert apply_of(MASKED)(noisy_params(MASKED), tokens).shape == (3, 12, 31)
    assert apply_of(CLASSES)(noisy_params(CLASSES), tokens).shape == (3, 3)


def test_both_heads_stand_on_the_same_encoder():
    pretrained, fine = shapes_of(MASKED), shapes_of(CLASSES)
    assert pretrained.pop("head") != fine.pop("head")
    assert pretrained == fine


def test_token_types_change_the_logits_and_default_to_the_first():
    params, tokens = noisy_params(MASKED), tokens_of(MASKED)
    none, first, second = (
        apply_of(MASKED)(params, tokens, types_BxT=types)
        for types in (None, jnp.zeros_like(tokens), jnp.ones_like(tokens))
    )
    np.testing.assert_array_equal(none, first)
    assert float(jnp.abs(first - second).max()) > 0.1


def test_constrain_sees_the_residual_stream_after_embedding_and_each_block():
    seen = []

    def halve(x):
        seen.append((x.shape, x.dtype))
        return x / 2

    params, tokens = noisy_params(MASKED), tokens_of(MASKED)
    halved = apply_of(MASKED)(params, tokens, halve)
    assert seen == [((3, 12, 16), jnp.dtype("float32"))] * (MASKED.layers + 1)
    assert float(jnp.abs(halved - apply_of(MASKED)(params, tokens)).max()) > 1e-3


def test_a_constant_row_has_finite_second_derivatives_at_the_smallest_eps():
    """The published eps of 1e-12 is all that there is in a variance of zero."""
    config = dataclasses.replace(MASKED, layers=1, norm_eps=1e-12)
    params = jax.tree.map(jnp.zeros_like, noisy_params(config))

    def loss(params):
        return jnp.square(split(config).apply(params, tokens_of(config))).mean()

    ones = jax.tree.map(jnp.ones_like, params)
    product = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (ones,))[1])(params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(product))


def test_too_many_tokens_name_the_cure():
    with pytest.raises(ValueError, match=r"13 tokens.*positions for 12.*context=13"):
        split(MASKED).apply(noisy_params(MASKED), jnp.zeros((1, 13), jnp.int32))


def within(share, expected, trials):
    return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / trials)


def test_masking_hides_its_shares():
    """Vocabulary and token so that a random token is seldom the mask or the same."""
    tokens = jnp.full((200, 500), 7)
    inputs, weights = masked(jax.random.key(0), tokens, vocab_size=30_000, rate=0.2)
    chosen, n = np.asarray(weights, bool), tokens.size
    np.testing.assert_array_equal(inputs[~chosen], 7)
    assert within(chosen.mean(), 0.2, n)
    seen = np.asarray(inputs)[chosen]
    assert within((seen == MASK).mean(), 0.8, n * 0.2)
    assert within((seen == 7).mean(), 0.1, n * 0.2)
    random = seen[(seen != MASK) & (seen != 7)]
    assert within((random < 15_000).mean(), 0.5, len(random))
    assert within((chosen[:, 1:] & chosen[:, :-1]).mean(), 0.04, n)  # each by itself


def test_masking_spares_what_is_not_maskable():
    tokens = tokens_of(MASKED, batch=64)
    inputs, weights = masked(jax.random.key(0), tokens, rate=1.0, maskable=tokens > 5)
    np.testing.assert_array_equal(weights, tokens > 5)
    np.testing.assert_array_equal(inputs[tokens <= 5], tokens[tokens <= 5])
    assert inputs.dtype == tokens.dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, r"rate=0.0 is not a share of tokens: choose one above 0"),
        ({"rate": 15}, r"rate=15 is not a share"),
        ({"mask_token": 31}, r"mask_token=31 is outside a vocabulary of 31: pass the id"),
    ],
)
def test_bad_masking_names_the_cure(change, message):
    with pytest.raises(ValueError, match=message):
        masked(jax.random.key(0), tokens_of(MASKED), **change)


def train(loss, params, steps):
    """(first loss, last loss, params) of Adam at a rate that suits a width of 16."""
    tx = optax.adam(0.01)

    @jax.jit
    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(9), steps)
    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
    return float(losses[:3].mean()), float(losses[-10:].mean()), params


def test_masked_tokens_are_learned_and_the_encoder_serves_to_classify():
    """Rows count up from a random token: the neighbours of a mask say what it hides."""
    model, fine = (split(dataclasses.replace(config, layers=1)) for config in (MASKED, CLASSES))

    def rows(key):
        starts = jax.random.randint(key, (32, 1), 0, 30)
        return (starts + jnp.arange(12)) % 30

    def masked_loss(params, key):
        draw, hide = jax.random.split(key)
        tokens = rows(draw)
        inputs, weights = masked(hide, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model.apply(params, inputs), tokens
        )
        return jnp.vdot(losses, weights) / weights.sum()

    def class_loss(params, key):
        tokens = rows(key)
        logits = fine.apply(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 5] // 10).mean()

    first, last, pretrained = train(masked_loss, model.init(jax.random.key(0)), steps=200)
    assert first > 0.9 * math.log(31) and last < 0.6 * first
    head = fine.init(jax.random.key(1))["head"]
    first, last, _ = train(class_loss, {**pretrained, "head": head}, steps=100)
    assert first > 0.9 * math.log(3) and last < 0.3 * first
