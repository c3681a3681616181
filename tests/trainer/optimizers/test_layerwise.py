"""Stacked layers take the steps that they would take apart, by every optimizer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moments import jit

import models
from models import DecoderConfig
from train.config.presets import preset
from train.optimizers.base import TrainContext
from train.optimizers.layerwise import matrices, probe
from train.optimizers.registry import OPTIMIZERS

LAYERS, STEPS = 3, 3
SIZES = {"up": (8, 12), "down": (12, 8), "scale": (8,)}
OTHERS = {"tokens": {"embedding": (20, 8)}, "norm": (8,)}


def random(seed, shapes):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def apart(seed):
    """Parameters, or gradients, of blocks with numbers."""
    return random(seed, OTHERS | {"blocks": {f"{i:02d}": {"mlp": SIZES} for i in range(LAYERS)}})


# What the defaults would leave out at these sizes.
CHANGED = {
    "adafactor": {"min_dim_size_to_factor": 4, "momentum": 0.5},
    "galore": {"rank": 3, "update_proj_gap": 2},
    "orthosoph": {"block_size": 4, "mu_dtype": "float32", "update_interval": 2, "b2": 0.5},
    "soaa": {"rule": "tadam"},
}


def path_of(optim, arrange):
    """The parameters after each of a few steps."""
    made = optim.build(TrainContext(lambda count: 0.1 / (1 + count), steps=10, batch_size=8)).tx
    tx = optax.with_extra_args_support(made)

    @jit
    def step(params, state, grads, hessian, loss):
        extra = {"hessian": hessian, "value": loss}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params = arrange(apart(0))
    state, found = jax.jit(tx.init)(params), []
    for n in range(1, STEPS + 1):
        hessian = arrange(jax.tree.map(jnp.square, apart(-n % 97)))
        params, state = step(params, state, arrange(apart(n)), hessian, 1.0 / n)
        found.append(params)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_stacked_layers_are_those_of_layers_apart(name):
    optim = preset("tiny", name).optim
    optim = dataclasses.replace(optim, **CHANGED.get(name, {}))
    have, want = (
        path_of(optim, models.stack_blocks),
        [models.stack_blocks(p) for p in path_of(optim, lambda tree: tree)],
    )
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, have, want)


def test_the_axis_of_layers_is_not_counted():
    holes = apart(0) | {"norm": optax.MaskedNode()}
    assert models.logical_ndims(models.stack_blocks(holes))["blocks"]["mlp"] == {
        "up": 2,
        "down": 2,
        "scale": 1,
    }
    assert models.logical_ndims(holes)["blocks"]["00"]["mlp"] == {"up": 2, "down": 2, "scale": 1}
    assert matrices(models.stack_blocks(holes)) == {
        "blocks": {"mlp": {"up": True, "down": True, "scale": False}},
        "norm": optax.MaskedNode(),
        "tokens": {"embedding": True},
    }
    assert models.logical_ndims(jnp.ones((2, 3))) == 2


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_a_probe_is_the_same_for_stacked_layers(kind):
    """And differs from layer to layer, and from matrix to matrix of one shape."""
    model = models.split(DecoderConfig(vocab_size=8, context=4, width=8, layers=3, heads=2))
    params = jax.eval_shape(model.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    draw, key = probe(kind), jax.random.key(1)
    apart, stacked = draw(key, zeros), draw(key, models.stack_blocks(zeros))
    jax.tree.map(np.testing.assert_array_equal, models.unstack_blocks(stacked), apart)
    blocks = apart["blocks"]
    query = [np.asarray(blocks[layer]["attention"]["query"]) for layer in blocks]
    assert not np.array_equal(query[0], query[1])
    assert not np.array_equal(query[0], blocks["00"]["attention"]["key"])
    numbers = np.concatenate([np.ravel(x) for x in jax.tree.leaves(apart)])
    error = 5 / np.sqrt(len(numbers))
    assert abs(numbers.mean()) < error and abs(np.mean(numbers**2) - 1) < 1.5 * error
