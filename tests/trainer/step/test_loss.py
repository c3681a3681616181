"""Losses: weighted, in chunks of positions, where the rows are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import DecoderConfig
from train.optimizers.adam import AdamW
from train.optimizers.base import Due, TrainContext
from train.optimizers.sophia import SophiaG
from train.parallel import mesh
from train.parallel.mesh import MeshConfig
from train.step.batch import Batch
from train.step.loss import mean_loss, normalized, outputs_of, token_losses
from train.step.train_step import init_state, make_step

CONFIG = DecoderConfig(vocab_size=40, context=8, width=16, layers=1, heads=2)
MODEL = models.split(CONFIG)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0))
RNG = np.random.default_rng(0)
WEIGHTS = RNG.random((16, 8)).astype(np.float32) * (RNG.random((16, 8)) < 0.6)
WEIGHTS[3::4] = 0  # every fourth row is padding: a micro-batch in which nothing counts
BATCH = Batch(RNG.integers(40, size=(16, 8)), RNG.integers(40, size=(16, 8)), WEIGHTS)
BATCH = jax.tree.map(jnp.asarray, BATCH)


def by_hand(params):
    """Σ w l / Σ w in float64."""
    logits = np.asarray(jax.jit(MODEL.apply)(params, BATCH.inputs), np.float64)
    top = logits.max(-1, keepdims=True)
    normalizer = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
    chosen = np.take_along_axis(logits, np.asarray(BATCH.targets)[..., None], -1)[..., 0]
    return float(np.sum(WEIGHTS * (normalizer - chosen)) / WEIGHTS.sum())


@pytest.mark.parametrize("chunk", [0, 4, 3])
def test_the_loss_is_the_weighted_mean_whole_and_in_chunks(chunk):
    outputs = outputs_of(MODEL, chunk)
    loss = jax.jit(lambda p: mean_loss(outputs(p, BATCH), normalized(BATCH)))
    np.testing.assert_allclose(loss(PARAMS), by_hand(PARAMS), rtol=1e-6)


def test_where_nothing_counts_the_loss_is_zero():
    empty = normalized(BATCH._replace(weights=jnp.zeros((16, 8))))
    value, grads = jax.jit(
        jax.value_and_grad(lambda p: mean_loss(outputs_of(MODEL)(p, empty), empty))
    )(PARAMS)
    assert value == 0
    assert all(bool(jnp.all(g == 0)) for g in jax.tree.leaves(grads))


@functools.cache
def after_two_steps(optim, accumulation, chunk=0):
    """(losses and norms, parameters); the first step samples curvature."""
    tx, sampling, *_ = optim.build(TrainContext(lambda _: 1e-2, 5, 5, 16, accumulation))
    how = {"sampling": sampling, "seed": 5, "accumulation": accumulation}
    step = jax.jit(make_step(outputs_of(MODEL, chunk), tx, **how), static_argnames="due")
    state, seen = jax.jit(functools.partial(init_state, MODEL.init, tx, 0))(), []
    for refresh in (True, False):
        state, metrics = step(state, BATCH, due=Due(refresh))
        seen.append((metrics["loss"], metrics["grad_norm"]))
    return np.array(seen), state


@pytest.mark.parametrize("optim", [AdamW(), SophiaG(groups=0, b1=0.8)], ids=["adamw", "sophia-g"])
@pytest.mark.parametrize(("accumulation", "chunk"), [(4, 0), (1, 4)])
def test_micro_batches_of_unequal_weight_and_chunks_are_the_batch_in_one_piece(
    optim, accumulation, chunk
):
    """Of one of the four nothing counts. Labels are drawn for rows, wherever these are."""
    have, state = after_two_steps(optim, accumulation, chunk)
    want, whole = after_two_steps(optim, 1)
    np.testing.assert_allclose(have, want, rtol=1e-6)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-7)
    jax.tree.map(near, state.opt_state, whole.opt_state)


def test_chunks_on_a_mesh_reduce_the_gradient_of_the_head_once():
    """Not in each of the rounds, of which there are four."""
    placed = mesh.make_mesh(MeshConfig(fsdp=2))
    outputs = outputs_of(MODEL, 2)
    batch = jax.device_put(BATCH._replace(weights=None), mesh.batch_sharding(placed))

    def compiled(over_rows):
        def loss(params, batch):
            return jnp.mean(token_losses(outputs(params, batch), batch, over_rows))

        return jax.jit(jax.grad(loss)).lower(PARAMS, batch).compile()

    apart, whole = compiled(functools.partial(mesh.over_rows, placed)), compiled(None)
    assert not _reduced_in_loops(apart, "f32[40,16]")
    assert _reduced_in_loops(whole, "f32[40,16]"), "else this test sees nothing"
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
    jax.tree.map(near, apart(PARAMS, batch), whole(PARAMS, batch))


def _reduced_in_loops(compiled, shape):
    """Lines of computations other than the entry that reduce an array of that shape."""
    computations = compiled.as_text().split("\n\n")
    return [
        line
        for text in computations
        if "ENTRY" not in text
        for line in text.splitlines()
        if "all-reduce(" in line and shape in line
    ]


def test_rows_that_devices_do_not_divide_have_their_losses_too():
    """As those of a set of rows with a probe of its own, on more devices than it has rows."""
    placed = mesh.make_mesh(MeshConfig(fsdp=2))
    few = jax.tree.map(lambda x: x[:3], BATCH)
    outputs = outputs_of(MODEL, 4)

    @jax.jit
    def losses(params):
        made = outputs(params, few)
        return token_losses(made, few, functools.partial(mesh.over_rows, placed)), token_losses(
            made, few
        )

    np.testing.assert_allclose(*losses(PARAMS), rtol=1e-6)
