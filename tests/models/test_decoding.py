"""A decoder with a cache against the same decoder on all tokens at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import DECODERS, GPT2, LLAMA2, MASKED, apply_of, noisy_params, tokens_of

from models import cached, split, stack_blocks

MODELS = DECODERS | {"layer-scale": dataclasses.replace(GPT2, attention_layer_scale=True)}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def decode_of(config):
    return jax.jit(cached(config).apply)


def in_pieces(config, params, tokens, cuts, cache):
    """Logits of the pieces that end at the cuts, joined; positions are traced."""
    logits, start = [], 0
    for end in cuts:
        piece, cache = decode_of(config)(params, tokens[:, start:end], cache, jnp.int32(start))
        logits.append(piece)
        start = end
    return jnp.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_and_then_each_token_have_the_logits_of_all_at_once(name, scan):
    config = MODELS[name]
    params, tokens = noisy_params(config), tokens_of(config)
    whole = apply_of(config)(params, tokens)
    if scan:
        config, params = dataclasses.replace(config, scan_layers=True), stack_blocks(params)
    cuts = (5, *range(6, 13))
    logits, _ = in_pieces(config, params, tokens, cuts, cached(config).init(3))
    np.testing.assert_allclose(logits, whole, **TOLERANCE)


def test_pieces_may_be_of_any_length_and_a_cache_of_what_is_needed():
    params, tokens = noisy_params(LLAMA2), tokens_of(LLAMA2)[:, :7]
    logits, cache = in_pieces(LLAMA2, params, tokens, (1, 4, 7), cached(LLAMA2).init(3, 7))
    np.testing.assert_allclose(logits, apply_of(LLAMA2)(params, tokens), **TOLERANCE)
    assert cache.key.shape == cache.value.shape == (2, 3, 7, 2, 4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_of_unequal_length_go_on_from_their_own_positions(name):
    """Prompts of 2, 5 and 4 tokens, padded to 5 with what must not matter."""
    config, lengths = MODELS[name], np.array([2, 5, 4])
    params, tokens = noisy_params(config), tokens_of(config)
    whole = np.asarray(apply_of(config)(params, tokens))
    prompt = jnp.where(np.arange(5) < lengths[:, None], tokens[:, :5], 7)
    _, cache = decode_of(config)(params, prompt, cached(config).init(3), jnp.zeros(3, jnp.int32))
    for step in range(4):
        at = lengths + step
        following = tokens[np.arange(3), at][:, None]
        logits, cache = decode_of(config)(params, following, cache, jnp.asarray(at, jnp.int32))
        np.testing.assert_allclose(logits[:, 0], whole[np.arange(3), at], **TOLERANCE)


def test_features_of_a_token_make_its_logits():
    params, tokens = noisy_params(LLAMA2), tokens_of(LLAMA2)
    x, _ = jax.jit(cached(LLAMA2).features)(params, tokens, cached(LLAMA2).init(3), 0)
    logits = split(LLAMA2).logits(params, x[:, -1])
    np.testing.assert_allclose(logits, apply_of(LLAMA2)(params, tokens)[:, -1], **TOLERANCE)


def test_a_cache_has_the_dtype_of_the_arithmetic_or_its_own():
    config = dataclasses.replace(LLAMA2, dtype="bfloat16")
    assert cached(config).init(1).key.dtype == jnp.bfloat16
    params, tokens = jax.jit(split(LLAMA2).init)(jax.random.key(0)), tokens_of(LLAMA2)
    whole = apply_of(LLAMA2)(params, tokens)
    cache = cached(LLAMA2).init(3, dtype="bfloat16")
    logits, cache = decode_of(LLAMA2)(params, tokens, cache, 0)
    assert cache.value.dtype == jnp.bfloat16
    assert 0 < float(jnp.abs(logits - whole).max()) < 0.01 * float(jnp.abs(whole).max())


def test_a_token_past_the_last_place_is_nan_and_harms_no_other():
    params, tokens = noisy_params(LLAMA2), tokens_of(LLAMA2)
    _, cache = decode_of(LLAMA2)(params, tokens[:, :5], cached(LLAMA2).init(3, 5), 0)
    at = jnp.array([5, 4, -1])
    logits, again = decode_of(LLAMA2)(params, tokens[:, 4:5], cache, at)
    assert bool(jnp.isnan(logits[jnp.array([0, 2])]).all())
    assert bool(jnp.isfinite(logits[1]).all())
    np.testing.assert_array_equal(again.key[:, 0], cache.key[:, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.init(1, 13), r"cache of 13 tokens.*context of 12: make the cache shorter, or"),
        (
            lambda m: m.apply({}, jnp.zeros((1, 3), int), m.init(1, 5), 3),
            r"3 tokens at position 3 do not fit a cache of 5: make the cache longer",
        ),
        (lambda m: m.apply({}, jnp.zeros((1, 3), int), m.init(1, 5), -1), r"at position -1 do not"),
        (lambda _: cached(MASKED), r"encoder predicts no next token.*pass a DecoderConfig"),
    ],
)
def test_what_does_not_fit_names_the_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call(cached(LLAMA2))
