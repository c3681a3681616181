"""The decoder against counts, a NumPy float64 forward pass and a second way to differentiate."""

import dataclasses
import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import GPT2, Decoder, DecoderConfig, split

CONFIG = DecoderConfig(vocab_size=31, context=12, width=16, layers=2, heads=4)
MILLIONS = {  # the quoted sizes, without positions
    "tiny": 0.115,
    "gpt2-30m": 29.9,
    "gpt2-125m": 123.6,
    "gpt2-355m": 353.6,
    "gpt2-540m": 535.8,
    "gpt2-770m": 772.3,
}


def tokens_of(config, batch=3, seed=1):
    return jax.random.randint(
        jax.random.key(seed), (batch, config.context), 0, config.vocab_size, jnp.int32
    )


@functools.cache
def jitted(config):
    model = split(config)
    return model._replace(init=jax.jit(model.init), apply=jax.jit(model.apply, static_argnums=2))


def noisy_params(config, seed=0):
    """Ten times the initial noise, so that attention is far from uniform; scales around one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray((x.ndim == 1) + 0.2 * rng.standard_normal(x.shape), x.dtype),
        jax.eval_shape(split(config).init, jax.random.key(0)),
    )


def cross_entropy(logits_BxTxV, labels_BxT):
    log_probs = jax.nn.log_softmax(logits_BxTxV)
    return -jnp.take_along_axis(log_probs, labels_BxT[..., None], axis=-1).mean()


def loss_of(config, tokens_BxT):
    apply = jitted(config).apply
    labels_BxT = np.roll(tokens_BxT, -1, axis=1)
    return lambda params: cross_entropy(apply(params, tokens_BxT), labels_BxT)


def norm_float64(x, scale):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * scale


def attention_float64(params, x, heads, depth):
    q, k, v = (
        np.stack(np.split(x @ params[name], heads, axis=-1)) for name in ("query", "key", "value")
    )
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) / depth
    scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.concatenate(list(weights @ v), axis=-1) @ params["out"]


def mlp_float64(params, x):
    u = x @ params["up"]
    gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    return gelu @ params["down"]


def decoder_float64(params, tokens, config):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = params["tokens"]["embedding"][tokens] + params["positions"]["embedding"][: tokens.shape[1]]
    for layer in range(config.layers):
        block = params["blocks"][f"{layer:02d}"]
        depth = layer + 1 if config.attention_layer_scale else 1
        normed = norm_float64(x, block["attention_norm"]["scale"])
        x = x + attention_float64(block["attention"], normed, config.heads, depth)
        x = x + mlp_float64(block["mlp"], norm_float64(x, block["mlp_norm"]["scale"]))
    return norm_float64(x, params["norm"]["scale"]) @ params["tokens"]["embedding"].T


@pytest.mark.parametrize("name", GPT2)
def test_preset_has_its_quoted_parameter_count(name):
    config = GPT2[name]
    shapes = jax.eval_shape(split(config).init, jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    matrices_of_a_block = 4 * config.width**2 + 2 * config.width * 4 * config.width
    norms = (2 * config.layers + 1) * config.width
    embeddings = (config.vocab_size + config.context) * config.width
    assert count == embeddings + config.layers * matrices_of_a_block + norms
    without_positions = (count - config.context * config.width) / 1e6
    digits = len(str(MILLIONS[name]).partition(".")[2])
    assert round(without_positions, digits) == MILLIONS[name]


def test_presets_are_the_gpt2_shapes():
    shapes = {name: (c.layers, c.heads, c.width) for name, c in GPT2.items() if name != "tiny"}
    assert shapes == {
        "gpt2-30m": (6, 6, 384),
        "gpt2-125m": (12, 12, 768),
        "gpt2-355m": (24, 16, 1024),
        "gpt2-540m": (30, 18, 1152),
        "gpt2-770m": (36, 20, 1280),
    }
    assert {(GPT2[n].vocab_size, GPT2[n].context) for n in shapes} == {(50304, 1024)}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, attention_layer_scale=True),
        # From eleven layers on, sorted names and layer order could differ.
        DecoderConfig(
            vocab_size=31, context=6, width=8, layers=11, heads=2, attention_layer_scale=True
        ),
    ],
    ids=["plain", "layer-scale", "eleven-layers"],
)
def test_logits_equal_a_float64_forward_pass(config):
    params, tokens = noisy_params(config), tokens_of(config)
    logits = jitted(config).apply(params, tokens)
    expected = decoder_float64(params, np.asarray(tokens), config)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_split_computes_what_the_module_computes():
    config, key = dataclasses.replace(CONFIG, layers=1), jax.random.key(3)
    model, tokens = split(config), tokens_of(config)
    np.testing.assert_array_equal(
        Decoder(config, rngs=nnx.Rngs(key))(tokens), model.apply(model.init(key), tokens)
    )


def test_a_later_token_never_changes_an_earlier_logit():
    length, apply = CONFIG.context, jitted(CONFIG).apply
    params, tokens = noisy_params(CONFIG), jnp.tile(tokens_of(CONFIG, batch=1), (length, 1))
    changed = (tokens + jnp.eye(length, dtype=jnp.int32)) % CONFIG.vocab_size
    moved = np.abs(apply(params, changed) - apply(params, tokens)).max(-1)  # [changed at, seen at]
    reaches = np.tri(length, dtype=bool).T
    np.testing.assert_array_equal(moved[~reaches], 0)
    assert (moved[reaches] > 1e-4).all()


def test_logits_of_a_shorter_sequence_are_a_prefix():
    params, tokens, apply = noisy_params(CONFIG), tokens_of(CONFIG), jitted(CONFIG).apply
    np.testing.assert_allclose(
        apply(params, tokens[:, :5]), apply(params, tokens)[:, :5], rtol=1e-4, atol=1e-5
    )


def test_initial_loss_is_that_of_a_uniform_guess():
    config = GPT2["tiny"]
    params = jitted(config).init(jax.random.key(0))
    loss = jax.jit(loss_of(config, tokens_of(config, batch=8)))(params)
    # Unit-variance rows against embeddings of std 0.02 give logits of variance width * 0.02^2.
    assert loss == pytest.approx(math.log(config.vocab_size) + config.width * 0.02**2 / 2, abs=0.02)


def test_initial_matrices_have_their_standard_deviation():
    config = DecoderConfig(vocab_size=256, context=64, width=64, layers=3, heads=4)
    params = jitted(config).init(jax.random.key(0))
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path[-1].key
        if name == "scale":
            np.testing.assert_array_equal(leaf, 1)
            continue
        expected = 0.02 / math.sqrt(6) if name in ("out", "down") else 0.02
        standard_error = expected / math.sqrt(2 * leaf.size)
        assert abs(float(leaf.std()) - expected) < 5 * standard_error, path
        assert abs(float(leaf.mean())) < 5 * expected / math.sqrt(leaf.size), path


def test_no_two_matrices_start_equal():
    params = jitted(CONFIG).init(jax.random.key(0))
    matrices = [np.asarray(x).tobytes() for x in jax.tree.leaves(params) if x.ndim == 2]
    assert len(set(matrices)) == len(matrices)


def test_attention_scale_of_layer_one_is_halved():
    """Doubling layer 1's queries undoes the option; layer 0 is the same with and without it."""
    params, tokens = noisy_params(CONFIG), tokens_of(CONFIG)
    scaled = jitted(dataclasses.replace(CONFIG, attention_layer_scale=True))
    plain = jitted(CONFIG).apply(params, tokens)
    assert float(jnp.abs(scaled.apply(params, tokens) - plain).max()) > 1e-2
    params["blocks"]["01"]["attention"]["query"] *= 2
    np.testing.assert_allclose(scaled.apply(params, tokens), plain, rtol=1e-5, atol=1e-5)


def test_jvp_of_grad_equals_grad_of_inner_product():
    config = dataclasses.replace(CONFIG, layers=1)
    params, loss = noisy_params(config), loss_of(config, tokens_of(config))
    vector = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params
    )

    def slope(params):
        products = jax.tree.map(jnp.vdot, jax.grad(loss)(params), vector)
        return jax.tree.reduce(jnp.add, products)

    forward = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (vector,))[1])(params)
    reverse = jax.jit(jax.grad(slope))(params)
    for one, other in zip(jax.tree.leaves(forward), jax.tree.leaves(reverse), strict=True):
        assert float(jnp.abs(other).max()) > 1e-3
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * scale)


def test_vmap_over_groups_equals_the_unbatched_logits():
    params, tokens_GxBxT = noisy_params(CONFIG), tokens_of(CONFIG, batch=9).reshape(3, 3, -1)
    grouped = jax.vmap(jitted(CONFIG).apply, in_axes=(None, 0))(params, tokens_GxBxT)
    for tokens, logits in zip(tokens_GxBxT, grouped, strict=True):
        single = jitted(CONFIG).apply(params, tokens)
        np.testing.assert_allclose(logits, single, rtol=1e-4, atol=1e-5)


def test_constrain_sees_the_residual_stream_after_embedding_and_each_block():
    seen = []

    def halve(x):
        seen.append((x.shape, x.dtype))
        return x / 2

    params, tokens = noisy_params(CONFIG), tokens_of(CONFIG)
    halved = jitted(CONFIG).apply(params, tokens, halve)
    shape = (3, CONFIG.context, CONFIG.width)
    assert seen == [(shape, jnp.dtype("float32"))] * (CONFIG.layers + 1)
    assert float(jnp.abs(halved - jitted(CONFIG).apply(params, tokens)).max()) > 1e-3


def test_a_token_outside_the_vocabulary_makes_nan():
    params, tokens = noisy_params(CONFIG), tokens_of(CONFIG).at[0, 4].set(CONFIG.vocab_size)
    logits = jitted(CONFIG).apply(params, tokens)
    assert bool(jnp.isnan(logits[0, 4:]).all()) and bool(jnp.isfinite(logits[1:]).all())


def test_too_many_tokens_name_the_cure():
    tokens = jnp.zeros((1, CONFIG.context + 1), jnp.int32)
    with pytest.raises(ValueError, match=r"13 tokens.*positions for 12.*context=13"):
        split(CONFIG).apply(noisy_params(CONFIG), tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"width 16 cannot be cut into 3 heads.*width 15"),
        ({"layers": 0}, "layers is 0.*set it to 1 or more"),
        ({"heads": 0}, "heads is 0.*set it to 1 or more"),
        ({"attention": "flash"}, "attention 'flash' is unknown: choose one of xla, cudnn"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown: choose one of float32, bfloat16"),
        ({"attention": "cudnn"}, "no float32 kernel: set dtype='bfloat16' or attention='xla'"),
    ],
)
def test_a_bad_config_names_the_cure(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_every_config_field_has_its_help_line():
    source = inspect.getsource(DecoderConfig)
    for field in dataclasses.fields(DecoderConfig):
        assert re.search(rf'    {field.name}: .*\n    """.+"""\n', source), field.name
