"""Llama, Qwen3, GPT-2 with biases and BERT: counts, and laws that each must obey."""

import dataclasses
import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import models
from models import BERT, LLAMA, PRESETS, QWEN3, DecoderConfig, EncoderConfig, split
from models.attention import rotate

GPT2 = DecoderConfig(vocab_size=31, context=12, width=16, layers=2, heads=4, bias=True)
LLAMA2 = dataclasses.replace(
    GPT2,
    bias=False,
    kv_heads=2,
    ffn_width=24,
    norm="rmsnorm",
    positions="rope",
    mlp="swiglu",
    tied=False,
)
QWEN = dataclasses.replace(LLAMA2, head_dim=6, qk_norm=True, tied=True, rope_theta=100.0)
MASKED = EncoderConfig(vocab_size=31, context=12, width=16, layers=2, heads=4, norm_eps=1e-5)
DECODERS = {"gpt2": GPT2, "llama": LLAMA2, "qwen3": QWEN}
FAMILIES = DECODERS | {"bert": MASKED}
EXACT = {  # of the papers' or the releases' models, after those of our own
    "tiny-llama": 125_248,
    "tiny-qwen3": 133_568,
    "tiny-bert": 125_120,
    "llama-60m": 58_073_600,
    "llama-130m": 134_105_856,
    "llama-350m": 367_969_280,
    "llama-1b": 1_339_082_752,
    "llama2-7b": 6_738_415_616,
    "qwen3-134m": 134_255_104 + 151_936 * 512,
    "qwen3-134m-gqa": 134_518_848,
    "qwen3-0.6b": 596_049_920,
    "bert-small": 28_763_648,
    "bert-base": 109_482_240,
}


@functools.cache
def apply_of(config):
    return jax.jit(split(config).apply, static_argnums=2)


def shapes_of(config):
    return jax.eval_shape(split(config).init, jax.random.key(0))


def noisy_params(config, seed=0):
    """Far from the initial values: attention is uneven, scales are near one, biases are not 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map_with_path(
        lambda path, x: jnp.asarray(
            (path[-1].key == "scale") + 0.3 * rng.standard_normal(x.shape), x.dtype
        ),
        shapes_of(config),
    )


def tokens_of(config, batch=3, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, config.context), 0, config.vocab_size)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_every_preset_of_these_families_has_an_exact_count():
    assert set(EXACT) == set(LLAMA) | set(QWEN3) | set(BERT)


@pytest.mark.parametrize("name", EXACT)
def test_preset_has_its_exact_parameter_count(name):
    config = {**LLAMA, **QWEN3, **BERT}[name]
    if name in BERT:  # with the pooler, and nothing on top of it
        config = dataclasses.replace(config, classes=2)
        assert count(shapes_of(config)) == EXACT[name] + 2 * config.width + 2
    else:
        assert count(shapes_of(config)) == EXACT[name]


def test_gpt2_with_biases_has_the_count_of_the_release():
    assert count(shapes_of(DecoderConfig(vocab_size=50257, bias=True))) == 124_439_808


def test_masked_bert_base_has_the_count_of_the_release():
    assert count(shapes_of(BERT["bert-base"])) == 109_514_298


def test_every_name_is_of_one_family():
    families = (models.GPT2, LLAMA, QWEN3, BERT)
    assert {name for family in families for name in family} == set(PRESETS)


@pytest.mark.parametrize("name", FAMILIES)
def test_specs_split_the_width_and_what_it_is_projected_to(name):
    """Over fsdp the width of a matrix, over tensor the other dimension and biases along it."""
    config = FAMILIES[name]
    specs, shapes = split(config).specs, shapes_of(config)
    for (path, spec), leaf in zip(
        jax.tree.leaves_with_path(specs), jax.tree.leaves(shapes), strict=True
    ):
        last = path[-1].key
        if leaf.ndim == 1:
            across = last in ("query_bias", "key_bias", "value_bias", "up_bias", "dense_bias")
            across |= jax.tree_util.keystr(path, simple=True, separator="/") == "head/bias"
            assert spec == (PartitionSpec("tensor") if across else PartitionSpec()), path
            continue
        few = path[0].key in ("positions", "types")
        assert set(spec) == {"fsdp", None if few else "tensor"}, path
        assert leaf.shape[spec.index("fsdp")] == config.width
        if leaf.shape[0] == leaf.shape[1]:  # where sizes do not tell
            assert spec.index("fsdp") == (last in ("out", "down")), path


def test_specs_split_no_class():
    specs = split(dataclasses.replace(MASKED, classes=3)).specs["head"]
    assert specs["out"] == PartitionSpec("fsdp", None) and specs["out_bias"] == PartitionSpec()
    assert specs["dense"] == PartitionSpec("fsdp", "tensor")


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_vectors_are_ones_and_zeros_and_matrices_have_their_deviation(name):
    params = jax.jit(split(FAMILIES[name]).init)(jax.random.key(0))
    shrunk = ("out", "down") if name in DECODERS else ()
    for path, leaf in jax.tree.leaves_with_path(params):
        if leaf.ndim == 1:
            np.testing.assert_array_equal(leaf, path[-1].key == "scale", str(path))
            continue
        expected = 0.02 / math.sqrt(4) if path[-1].key in shrunk else 0.02
        assert abs(float(leaf.std()) - expected) < 5 * expected / math.sqrt(2 * leaf.size), path


@pytest.mark.parametrize("name", DECODERS)
def test_a_later_token_never_changes_an_earlier_logit(name):
    config = DECODERS[name]
    params, tokens = noisy_params(config), jnp.tile(tokens_of(config, batch=1), (12, 1))
    changed = (tokens + jnp.eye(12, dtype=jnp.int32)) % config.vocab_size
    logits = [apply_of(config)(params, x) for x in (changed, tokens)]
    moved = np.abs(logits[0] - logits[1]).max(-1)  # [changed at, seen at]
    reaches = np.tri(12, dtype=bool).T
    np.testing.assert_array_equal(moved[~reaches], 0)
    assert (moved[reaches] > 1e-4).all()


def test_every_token_of_an_encoder_reaches_every_logit():
    params, tokens = noisy_params(MASKED), jnp.tile(tokens_of(MASKED, batch=1), (12, 1))
    changed = (tokens + jnp.eye(12, dtype=jnp.int32)) % MASKED.vocab_size
    logits = [apply_of(MASKED)(params, x) for x in (changed, tokens)]
    assert (np.abs(logits[0] - logits[1]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("config", [LLAMA2, QWEN], ids=["llama", "qwen3"])
def test_shared_key_heads_are_full_attention_with_repeated_ones(config):
    params, tokens = noisy_params(config), tokens_of(config)
    full = jax.tree.map(lambda x: x, params)
    for block in full["blocks"].values():
        for name in ("key", "value"):
            heads_DxKxH = block["attention"][name].reshape(config.width, config.kv_heads, -1)
            repeated = jnp.repeat(heads_DxKxH, config.heads // config.kv_heads, axis=1)
            block["attention"][name] = repeated.reshape(config.width, -1)
    np.testing.assert_allclose(
        apply_of(config)(params, tokens),
        apply_of(dataclasses.replace(config, kv_heads=0))(full, tokens),
        rtol=1e-5,
        atol=1e-5,
    )


def test_normed_queries_and_keys_have_no_length():
    params, tokens = noisy_params(QWEN), tokens_of(QWEN)
    longer = jax.tree.map_with_path(
        lambda path, x: 64 * x if path[-1].key in ("query", "key") else x, params
    )
    config = dataclasses.replace(QWEN, norm_eps=1e-12)
    one, other = (apply_of(config)(p, tokens) for p in (params, longer))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    unnormed = dataclasses.replace(config, qk_norm=False)
    for p in (params, longer):
        for block in p["blocks"].values():
            del block["attention"]["query_norm"], block["attention"]["key_norm"]
    one, other = (apply_of(unnormed)(p, tokens) for p in (params, longer))
    assert float(jnp.abs(one - other).max()) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotation_is_a_complex_product_in_float64(dtype):
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8), dtype)
    positions, theta = np.array([[0, 1, 7, 1000, 4000]]), 50.0
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    angles = positions[..., None, None] * theta ** (-np.arange(0, 8, 2) / 8)
    turned = (first + 1j * second) * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    ours = rotate(x, jnp.asarray(positions), theta)
    assert ours.dtype == dtype
    # Angles of 4000 in float32 are exact to 4000 * 2^-24; results have the rounding of their dtype.
    atol = 2e-3 if dtype == "float32" else 2**-6
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=0, atol=atol)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    at = lambda x, p: rotate(x, jnp.array([[p]]), 100.0)  # noqa: E731
    products = [float(jnp.vdot(at(q, p + 5), at(k, p))) for p in (0, 1, 30, 500)]
    np.testing.assert_allclose(products, products[0], rtol=0, atol=1e-3)
    assert abs(products[0] - float(jnp.vdot(at(q, 4), at(k, 0)))) > 0.1
    np.testing.assert_array_equal(at(q, 0), q)


SEGMENTS = np.array([3] * 5 + [1] * 4 + [0] * 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_sequences_have_the_logits_that_each_has_alone(name):
    config = FAMILIES[name]
    params, tokens = noisy_params(config), tokens_of(config)
    segments = jnp.tile(SEGMENTS, (3, 1))
    packed = apply_of(config)(params, tokens, segments_BxT=segments)
    assert bool(jnp.isfinite(packed).all())
    for number in (3, 1):
        (places,) = np.nonzero(segments[0] == number)
        alone = apply_of(config)(params, tokens[:, places])
        np.testing.assert_allclose(packed[:, places], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", [slice(8, None), slice(4)], ids=["right", "left"])
def test_padding_never_changes_a_logit_of_a_sequence(name, side):
    config = FAMILIES[name]
    params, tokens = noisy_params(config), tokens_of(config)
    segments = jnp.ones_like(tokens).at[:, side].set(0)
    others = tokens.at[:, side].set(5)
    one, other = (apply_of(config)(params, x, segments_BxT=segments) for x in (tokens, others))
    np.testing.assert_array_equal(one[segments == 1], other[segments == 1])
    assert float(jnp.abs(one - other).max()) > 1e-3


def test_one_segment_is_none():
    for config in FAMILIES.values():
        params, tokens = noisy_params(config), tokens_of(config)
        segments = jnp.full_like(tokens, 4)
        np.testing.assert_allclose(
            apply_of(config)(params, tokens, segments_BxT=segments),
            apply_of(config)(params, tokens),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "gpt2")) for n in FAMILIES]
)
def test_forward_over_reverse_is_reverse_over_reverse(name):
    """What a Hutchinson sample is made of, padding included."""
    config = dataclasses.replace(FAMILIES[name], layers=1)
    params, tokens = noisy_params(config), tokens_of(config)
    segments = jnp.tile(SEGMENTS, (3, 1))

    def loss(params):
        log_probs = jax.nn.log_softmax(apply_of(config)(params, tokens, segments_BxT=segments))
        return -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1).mean()

    vector = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size) * 1.0).reshape(x.shape), params)

    def slope(params):
        products = jax.tree.map(jnp.vdot, jax.grad(loss)(params), vector)
        return jax.tree.reduce(jnp.add, products)

    forward = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (vector,))[1])(params)
    reverse = jax.jit(jax.grad(slope))(params)
    leaves = zip(jax.tree.leaves_with_path(forward), jax.tree.leaves(reverse), strict=True)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(reverse))
    for (path, one), other in leaves:
        scale = float(jnp.abs(other).max())
        # What cancels to 0 keeps rounding errors of the size of what cancelled.
        noise = 10 * jnp.finfo(jnp.float32).eps * largest
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=max(1e-4 * scale, noise))
        # A key bias adds the same to all scores of a query, which the softmax ignores.
        assert (scale > 1e-4) == (path[-1].key != "key_bias"), path


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_compute_is_near_float32_and_returns_float32(name):
    config = FAMILIES[name]
    params = jax.jit(split(config).init)(jax.random.key(0))
    exact = apply_of(config)(params, tokens_of(config))
    with jax.numpy_dtype_promotion("standard"):  # that jax.nn.dot_product_attention needs
        rough = apply_of(dataclasses.replace(config, dtype="bfloat16"))(params, tokens_of(config))
    assert rough.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(rough - exact).max() / jnp.abs(exact).max()) < 0.05


def test_an_untied_head_has_a_gradient_apart_from_the_embeddings():
    params, tokens = noisy_params(LLAMA2), tokens_of(LLAMA2) % 7
    grads = jax.grad(lambda p: apply_of(LLAMA2)(p, tokens).var())(params)
    unseen = np.asarray(jnp.abs(grads["tokens"]["embedding"]).max(-1))[7:]
    np.testing.assert_array_equal(unseen, 0)
    assert float(jnp.abs(grads["head"]["embedding"]).max(-1).min()) > 1e-4


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA2, {"kv_heads": 3}, r"4 heads cannot share 3 key/value heads equally: choose"),
        (LLAMA2, {"kv_heads": -1}, r"kv_heads is -1, .*set it to 0 or more"),
        (LLAMA2, {"head_dim": 5}, r"head of width 5 cannot be rotated.*make head_dim"),
        (LLAMA2, {"heads": 3}, r"width 16 cannot be cut into 3 heads.*width 15"),
        (LLAMA2, {"norm_eps": 0.0}, r"norm_eps is 0.0: set it above 0"),
        (LLAMA2, {"rope_theta": math.nan}, r"rope_theta is nan: set it above 0"),
        (LLAMA2, {"mlp": "relu"}, "mlp 'relu' is unknown: choose one of gelu, swiglu"),
        (LLAMA2, {"norm": "none"}, "norm 'none' is unknown: choose one of layernorm, rmsnorm"),
        (LLAMA2, {"positions": "alibi"}, "positions 'alibi' is unknown: choose one of learned, r"),
        (MASKED, {"heads": 3}, r"width 16 cannot be cut into 3 heads.*width 15"),
        (MASKED, {"token_types": 0}, "token_types is 0.*set it to 1 or more"),
        (MASKED, {"classes": -1}, "classes is -1.*set it to 0 or more"),
        (MASKED, {"attention": "cudnn"}, "no float32 kernel: set dtype='bfloat16' or"),
    ],
)
def test_a_bad_config_names_the_cure(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_heads_need_not_divide_the_width_where_their_own_is_given():
    config = dataclasses.replace(LLAMA2, width=20, heads=3, kv_heads=1, head_dim=4)
    assert apply_of(config)(noisy_params(config), tokens_of(config)).shape == (3, 12, 31)


def test_every_config_field_of_an_encoder_has_its_help_line():
    source = inspect.getsource(EncoderConfig)
    for field in dataclasses.fields(EncoderConfig):
        assert re.search(rf'    {field.name}: .*\n    """.+"""\n', source), field.name
