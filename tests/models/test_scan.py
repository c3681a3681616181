"""Scanned layers and recomputed activations change how a model is computed, and no number."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_families import (
    FAMILIES,
    GPT2,
    LLAMA2,
    SEGMENTS,
    noisy_params,
    shapes_of,
    tokens_of,
)

from models import huggingface, logical_ndims, split, stack_blocks, unstack_blocks

MODELS = FAMILIES | {"layer-scale": dataclasses.replace(GPT2, attention_layer_scale=True)}
TOLERANCE = {"rtol": 2e-4, "atol": 1e-5}


def scanned(config, **changes):
    return dataclasses.replace(config, scan_layers=True, **changes)


def loss_of(config, **inputs):
    """Cross-entropy of packed rows."""
    tokens = tokens_of(config)
    segments = jnp.tile(SEGMENTS, (3, 1))

    def loss(params):
        logits = split(config).apply(params, tokens, segments_BxT=segments, **inputs)
        log_probs = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probs, tokens[..., None], -1).mean(), logits

    return loss


def value_and_grad(config, params):
    return jax.jit(jax.value_and_grad(loss_of(config), has_aux=True))(params)


def assert_close(one, other, **tolerance):
    tolerance = tolerance or TOLERANCE
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), one, other)


@functools.cache
def unrolled(name):
    """(logits, gradient) of the plain layout, at params far from the initial ones."""
    (_, logits), grads = value_and_grad(MODELS[name], noisy_params(MODELS[name]))
    return logits, grads


@pytest.mark.parametrize("name", MODELS)
def test_a_scan_has_the_logits_and_the_gradient_of_its_blocks_one_by_one(name):
    config = MODELS[name]
    (_, logits), grads = value_and_grad(scanned(config), stack_blocks(noisy_params(config)))
    assert_close((logits, unstack_blocks(grads)), unrolled(name))


@pytest.mark.parametrize(
    ("name", "remat", "scan"),
    [
        ("layer-scale", "dots", True),
        ("layer-scale", "full", False),
        ("bert", "dots", False),
        ("bert", "full", True),
    ],
)
def test_what_is_computed_again_is_the_same(name, remat, scan):
    config = dataclasses.replace(MODELS[name], remat=remat, scan_layers=scan)
    params = noisy_params(MODELS[name])
    (_, logits), grads = value_and_grad(config, stack_blocks(params) if scan else params)
    assert_close((logits, unstack_blocks(grads)), unrolled(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_start_at_the_same_values(name):
    config = FAMILIES[name]
    plain = split(config).init(jax.random.key(0))
    stacked = split(scanned(config)).init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, stack_blocks(plain), stacked)
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), plain)


def test_layouts_keep_the_order_of_layers_and_where_arrays_are():
    blocks = {f"{i:02d}": {"up": np.full(3, i)} for i in range(101)}
    tree = {"blocks": blocks, "norm": {"scale": np.ones(3)}}
    stacked = stack_blocks(tree)
    np.testing.assert_array_equal(stacked["blocks"]["up"][:, 0], np.arange(101))
    assert type(stacked["blocks"]["up"]) is np.ndarray
    assert stack_blocks(stacked) is stacked and unstack_blocks(tree) is tree
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), tree)
    assert stack_blocks({"w": blocks}) == unstack_blocks({"w": blocks}) == {"w": blocks}


@pytest.mark.parametrize("name", FAMILIES)
def test_specs_of_stacked_parameters_lead_with_none(name):
    config = FAMILIES[name]
    plain, stacked = split(config).specs, split(scanned(config)).specs
    one = plain.pop("blocks")["01"]
    expected = jax.tree.map(lambda spec: P(None, *spec) if spec else spec, one)
    assert stacked.pop("blocks") == expected and stacked == plain


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layer_axis_is_no_dimension(name):
    plain, stacked = (shapes_of(c) for c in (FAMILIES[name], scanned(FAMILIES[name])))
    dimensions = logical_ndims(plain)
    assert dimensions == jax.tree.map(lambda x: len(x.shape), plain)
    block = dimensions["blocks"]["00"]
    assert logical_ndims(stacked) == dimensions | {"blocks": block}


def test_a_scan_of_twelve_layers_is_a_fraction_of_the_program():
    config = dataclasses.replace(LLAMA2, layers=12)
    one, other = (
        jax.jit(split(c).apply).lower(shapes_of(c), tokens_of(c)).as_text()
        for c in (scanned(config), config)
    )
    assert len(one) < len(other) / 4


def lowered_gradient(config):
    return jax.jit(jax.grad(loss_of(config), has_aux=True)).lower(shapes_of(config)).as_text()


def test_remat_computes_dense_products_again_only_where_it_is_full():
    """Seven dense products a block of a Llama, and two of attention, which have batch dimensions;
    of two layers the last product need not be computed twice.
    """
    counts = {}
    for remat in ("none", "dots", "full"):
        text = lowered_gradient(dataclasses.replace(LLAMA2, remat=remat))
        products = re.findall(r"stablehlo.dot_general.*", text)
        batched = sum("batching_dims" in line for line in products)
        counts[remat] = len(products) - batched, batched
    dense, batched = counts["none"]
    assert counts["dots"][0] == dense and counts["dots"][1] > batched
    assert dense + 2 * 6 <= counts["full"][0] <= dense + 2 * 7


def test_forward_over_reverse_of_a_scan_is_that_of_its_blocks():
    """What Hutchinson's estimator computes."""
    plain, config = LLAMA2, scanned(LLAMA2, remat="dots")
    params = noisy_params(plain)
    probe = jax.tree.map(lambda x: jnp.sign(x + 1e-3), noisy_params(plain, seed=1))

    def product(config, params, probe):
        gradient = jax.grad(lambda p: loss_of(config)(p)[0])
        return jax.jit(lambda p, v: jax.jvp(gradient, (p,), (v,))[1])(params, probe)

    ours = product(config, stack_blocks(params), stack_blocks(probe))
    assert_close(unstack_blocks(ours), product(plain, params, probe), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_groups_side_by_side_on_a_mesh(scan):
    """What Gauss-Newton-Bartlett's estimator computes: gradients of groups of rows under vmap."""
    plain = dataclasses.replace(LLAMA2, layers=1)
    config = dataclasses.replace(plain, remat="dots", scan_layers=scan)
    params = noisy_params(plain)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    tokens = jax.device_put(tokens_of(config, batch=8).reshape(8, 1, -1), NamedSharding(mesh, P()))
    inside = NamedSharding(mesh, P())

    def gradient(config, params, tokens, **constrain):
        return jax.grad(lambda p: split(config).apply(p, tokens, **constrain).var())(params)

    def constrain(x):
        return jax.lax.with_sharding_constraint(x, inside)

    def groups(params):
        one = functools.partial(gradient, config, params, constrain=constrain)
        grads = jax.vmap(one, spmd_axis_name=("data", "fsdp"))(tokens)
        return jax.tree.map(lambda x: x[3], grads)

    ours = jax.jit(groups)(stack_blocks(params) if scan else params)
    expected = jax.jit(functools.partial(gradient, plain))(params, tokens[3])
    assert_close(unstack_blocks(ours), expected, rtol=1e-3, atol=1e-4)


def test_constrain_is_in_the_body_of_a_scan():
    config, seen = scanned(LLAMA2), []
    params, tokens = shapes_of(config), tokens_of(config)
    jax.eval_shape(lambda p: split(config).apply(p, tokens, lambda x: seen.append(x) or x), params)
    assert [x.shape for x in seen] == [(3, 12, 16)] * 2


def test_a_file_is_loaded_in_either_layout_and_saved_from_it(tmp_path):
    config = scanned(FAMILIES["qwen3"], vocab_multiple=8, remat="dots")
    plain = noisy_params(FAMILIES["qwen3"])
    huggingface.save(plain, FAMILIES["qwen3"], tmp_path / "plain")
    changes = {"scan_layers": True, "vocab_multiple": 8, "remat": "dots"}
    loaded, params = huggingface.load(tmp_path / "plain", **changes)
    assert loaded == config
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params["blocks"], stack_blocks(plain)["blocks"])
    huggingface.save(params, config, tmp_path / "stacked")
    names = ("model.safetensors", "config.json")
    files = [[(tmp_path / kind / n).read_bytes() for n in names] for kind in ("plain", "stacked")]
    assert files[0] == files[1]


def test_an_unknown_remat_names_the_cure():
    with pytest.raises(
        ValueError, match=r"remat 'some' is unknown: choose one of none, dots, full"
    ):
        dataclasses.replace(LLAMA2, remat="some")
