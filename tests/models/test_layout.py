"""Features and logits, a padded vocabulary, a mesh with a tensor axis, stacked blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_families import FAMILIES, LLAMA2, MASKED, noisy_params, shapes_of, tokens_of

from models import huggingface, logical_ndims, split
from models.layers import PADDING_LOGIT, padding_bias

MODELS = FAMILIES | {"classes": dataclasses.replace(MASKED, classes=3)}


def padded(config, multiple=8):
    return dataclasses.replace(config, vocab_multiple=multiple)


def with_rows(params, rows, value=3.0):
    """Parameters with rows of padding, of a value that must not matter."""

    def pad(path, x):
        names = "/".join(key.key for key in path)
        if names not in huggingface.VOCABULARY:
            return x
        return jnp.pad(x, [(0, rows), (0, 0)][: x.ndim], constant_values=value)

    return jax.tree.map_with_path(pad, params)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_features_are_what_the_model_applies_to_any_chunk(name):
    config = MODELS[name]
    model, params, tokens = split(config), noisy_params(config), tokens_of(config)
    x = jax.jit(model.features)(params, tokens)
    logits = jax.jit(model.apply)(params, tokens)
    assert x.shape == (*logits.shape[:-1], config.width) and logits.dtype == jnp.float32
    np.testing.assert_allclose(model.logits(params, x), logits, rtol=1e-5, atol=1e-5)
    flat = x.reshape(-1, config.width)[1]
    chunk = logits.reshape(-1, logits.shape[-1])[1]
    np.testing.assert_allclose(model.logits(params, flat), chunk, rtol=1e-5, atol=1e-5)
    matrix, bias = model.unembedding(params)
    products = x @ matrix.T + (0 if bias is None else bias)
    np.testing.assert_allclose(products, logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_features_have_float32_logits():
    config = dataclasses.replace(LLAMA2, dtype="bfloat16", layers=1)
    model, params = split(config), noisy_params(config)
    with jax.numpy_dtype_promotion("standard"):
        x = jax.eval_shape(model.features, params, tokens_of(config))
    assert x.dtype == jnp.bfloat16
    assert jax.eval_shape(model.logits, params, x).dtype == jnp.float32


def test_features_are_constrained_as_the_model_is():
    seen = []
    config = dataclasses.replace(MASKED, layers=1)
    inputs = {"segments_BxT": jnp.ones((3, 12), int), "types_BxT": jnp.ones((3, 12), int)}
    jax.eval_shape(
        lambda p: split(config).features(p, tokens_of(config), lambda x: seen.append(x) or x),
        noisy_params(config),
    )
    assert len(seen) == 2
    features = jax.jit(split(config).features)
    one, other = (
        features(noisy_params(config), tokens_of(config), **kwargs) for kwargs in ({}, inputs)
    )
    assert float(jnp.abs(one - other).max()) > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_rows_that_pad_a_vocabulary_change_no_probability_and_get_no_gradient(name):
    config = dataclasses.replace(FAMILIES[name], layers=1)
    assert (config.padded_vocab, padded(config).padded_vocab) == (31, 32)
    params, tokens = noisy_params(config), tokens_of(config)

    def loss(config):
        def of(params):
            log_probs = jax.nn.log_softmax(split(config).apply(params, tokens))
            return -jnp.take_along_axis(log_probs, tokens[..., None], -1).mean(), log_probs

        return jax.jit(jax.grad(of, has_aux=True))

    grads, plain = loss(config)(params)
    more, wide = loss(padded(config))(with_rows(params, 1))
    assert wide.shape[-1] == 32 and bool(jnp.isfinite(wide).all())
    np.testing.assert_array_equal(jnp.exp(wide[..., 31:]), 0)
    np.testing.assert_allclose(wide[..., :31], plain, rtol=1e-5, atol=1e-5)
    expected = with_rows(grads, 1, 0.0)
    for one, other in zip(*map(jax.tree.leaves, (more, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_no_label_is_drawn_from_padding_and_no_token_of_it_is_read():
    config = padded(dataclasses.replace(LLAMA2, layers=1), 100)
    model, params = split(config), jax.jit(split(config).init)(jax.random.key(0))
    logits = jax.jit(model.apply)(params, tokens_of(config))
    labels = jax.random.categorical(jax.random.key(1), logits[..., None, :], shape=(3, 12, 40))
    assert int(labels.max()) == 30  # of 69 rows of padding, none
    unknown = tokens_of(config).at[0, 0].set(31)
    assert bool(jnp.isnan(jax.jit(model.apply)(params, unknown)[0]).any(-1).all())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_changes_no_initial_value(name):
    config = FAMILIES[name]
    plain, wide = (split(c).init(jax.random.key(3)) for c in (config, padded(config)))
    jax.tree.map(np.testing.assert_array_equal, wide, with_rows(plain, 1, 0.0))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_file_has_no_padding_and_may_be_loaded_with_it(name, tmp_path):
    config = FAMILIES[name]
    params = noisy_params(config)
    huggingface.save(with_rows(params, 9), padded(config, 40), tmp_path)
    plain = huggingface.load(tmp_path)
    assert plain[0].padded_vocab == 31
    jax.tree.map(np.testing.assert_array_equal, plain[1], params)
    wide, again = huggingface.load(tmp_path, vocab_multiple=8)
    assert wide == dataclasses.replace(plain[0], vocab_multiple=8)
    jax.tree.map(np.testing.assert_array_equal, again, with_rows(params, 1, 0.0))
    with pytest.raises(ValueError, match="width is decided by the file: give none but attention"):
        huggingface.load(tmp_path, width=8)


def test_a_multiple_below_one_names_the_cure():
    with pytest.raises(ValueError, match=r"vocab_multiple is 0.*set it to 1 or more"):
        padded(MASKED, 0)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_mesh_with_a_tensor_axis_computes_the_same(name):
    """Each of 8 devices holds 1 / 4 of every matrix; heads and vocabulary are split."""
    config = dataclasses.replace(padded(FAMILIES[name]), layers=1)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    model, params, tokens = split(config), noisy_params(config), tokens_of(config, batch=4)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), model.specs)
    constrain = lambda x: jax.lax.with_sharding_constraint(x, rows)  # noqa: E731
    placed, spread = jax.device_put((params, tokens), (shardings, rows))
    few = ("positions", "types")
    for path, leaf in jax.tree.leaves_with_path(placed):
        if leaf.ndim == 2 and path[0].key not in few:
            assert leaf.addressable_shards[0].data.size == leaf.size // 4, path
    ours = jax.jit(lambda p, t: model.apply(p, t, constrain))(placed, spread)
    np.testing.assert_allclose(ours, model.apply(params, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_dimensions_of_parameters(name):
    shapes = shapes_of(FAMILIES[name])
    assert logical_ndims(shapes) == jax.tree.map(lambda x: len(x.shape), shapes)


def test_the_bias_of_a_padded_head_hides_every_row_of_padding():
    """Chunked logits add it where `mask_padding` would replace whole logits."""
    bias = padding_bias(8, 5)
    np.testing.assert_array_equal(bias[:5], 0)
    assert (bias[5:] == PADDING_LOGIT).all() and padding_bias(5, 5) is None
