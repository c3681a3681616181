"""Micro-batches: loss, gradient and curvature are those of the batch that they are cut from."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
from models import DecoderConfig
from sophia_optax import gauss_newton_bartlett, hutchinson
from sophia_optax.estimators.rows import split_interleaved
from train import program
from train.config.presets import preset
from train.optimizers.base import Due, TrainContext
from train.optimizers.layerwise import probe
from train.optimizers.sophia import SophiaG, SophiaH
from train.parallel.mesh import MeshConfig
from train.step.batch import next_tokens
from train.step.loss import mean_loss, outputs_of
from train.step.train_step import init_state, make_step

ROWS, SEED = 16, 5
MODEL = models.split(DecoderConfig(vocab_size=32, context=8, width=8, layers=1, heads=2))
OUTPUTS = outputs_of(MODEL)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(32, size=(5, ROWS, 9)))
BATCHES = [next_tokens(tokens) for tokens in TOKENS]


def make(optim, accumulation):
    """(jitted step, initial state) of a config."""
    tx, sampling, *_ = optim.build(TrainContext(lambda _: 1e-2, SEED, 5, ROWS, accumulation))
    step = make_step(OUTPUTS, tx, sampling=sampling, seed=SEED, accumulation=accumulation)
    state = jax.jit(functools.partial(init_state, MODEL.init, tx, 0))()
    return jax.jit(step, static_argnames="due"), state


@functools.cache
def five_steps(optim, accumulation):
    """Losses and norms of gradients, with curvature at steps 0, 2 and 4."""
    step, state = make(optim, accumulation)
    rows = []
    for number, batch in enumerate(BATCHES):
        state, metrics = step(state, batch, due=Due(number % 2 == 0))
        rows.append((metrics["loss"], metrics["grad_norm"]))
    return np.array(rows)


def test_a_micro_batch_has_every_kth_row():
    batch = jnp.arange(24).reshape(12, 2)
    np.testing.assert_array_equal(split_interleaved(batch, 3), [batch[i::3] for i in range(3)])


@pytest.mark.parametrize("accumulation", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    "optim",
    [
        preset("tiny", "adamw").optim,
        pytest.param(SophiaH(batch_fraction=0.25, b1=0.8), marks=pytest.mark.slow),
    ],
)
def test_accumulation_leaves_the_losses_as_they_are(optim, accumulation):
    """A quarter of the rows is the same quarter in one piece, half a micro-batch, and a whole."""
    have, want = (five_steps(optim, number) for number in (accumulation, 1))
    np.testing.assert_allclose(have, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "number", "groups"),
    [
        (SophiaG, 2, 4),
        (SophiaH, 8, None),
        pytest.param(SophiaG, 1, 4, marks=pytest.mark.slow),
        pytest.param(SophiaG, 8, 0, marks=pytest.mark.slow),
        pytest.param(SophiaH, 2, None, marks=pytest.mark.slow),
    ],
)
def test_a_sample_is_the_mean_of_those_of_the_sampled_micro_batches(kind, number, groups):
    """Of four: all, two, and half of one. Loss and gradient are those of all rows."""
    chosen, fraction = {1: ([0, 1, 2, 3], 1), 2: ([0, 2], 1), 8: ([0], 0.5)}[number]
    if kind is SophiaG:
        optim = SophiaG(batch_fraction=1 / number, groups=groups)
        each = gauss_newton_bartlett(groups=groups // len(chosen) or 2, batch_fraction=fraction)
    else:
        optim, each = (
            SophiaH(batch_fraction=1 / number),
            hutchinson(batch_fraction=fraction, probe=probe("rademacher")),
        )
    step, state = make(optim, 4)
    params, batch, key = state.params, BATCHES[0], jax.random.fold_in(jax.random.key(SEED), 0)
    after, metrics = step(state, batch, due=Due(True))
    extra = {
        "logits_fn": OUTPUTS,
        "obj_fn": lambda params, batch: mean_loss(OUTPUTS(params, batch), batch),
    }

    @jax.jit
    def sample(tokens, numbers):
        rows = next_tokens(tokens)
        return each(key, params, None, inputs=rows, row_numbers=numbers, **extra)

    numbers = jnp.arange(ROWS)
    samples = [sample(TOKENS[0, i::4], numbers[i::4]) for i in chosen]
    state = optax.tree.get(after.opt_state, "HessianEstimateState")
    have = jax.tree.map(lambda h: h / state.mass, state.h)
    want = jax.tree.map(lambda *h: np.mean(h, 0), *samples)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-7), have, want)
    loss, grads = jax.jit(jax.value_and_grad(extra["obj_fn"]))(params, batch)
    exact = [loss, optax.tree.norm(grads)]
    np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], exact, rtol=1e-6)


def assemble(devices, accumulation, optimizer="sophia-g", **fields):
    run = preset("tiny", optimizer)
    return program.assemble(
        dataclasses.replace(
            run,
            model=DecoderConfig(vocab_size=256, context=16, width=32, layers=1, heads=2),
            optim=dataclasses.replace(run.optim, **fields),
            mesh=MeshConfig(fsdp=min(4, len(devices))),
            sequence_length=16,
            batch_size=32,
            accumulation=accumulation,
        ),
        devices,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulation", "fields"), [(2, {"groups": 16}), (4, {"batch_fraction": 0.25})]
)
def test_eight_devices_follow_one(accumulation, fields):
    """Groups side by side in both micro-batches; one micro-batch sampled of four."""
    losses = []
    for devices in (jax.devices(), jax.devices()[:1]):
        programs = assemble(devices, accumulation, **fields)
        state, seen = programs.init(), []
        for step in range(5):
            batch = programs.batch(step)
            state, metrics = programs.step(state, batch, due=Due(step % 2 == 0))
            seen.append(metrics["loss"])
        losses.append(np.array(seen))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_micro_batches_keep_parameters_sharded():
    """The loop carries no matrix as a whole, though each round gathers it; rows are not moved."""
    text = assemble(jax.devices(), 4, "adamw").compile(Due()).as_text()
    loops = re.findall(r"= \((.*?)\) while\(", text)
    (loop,) = (shapes for shapes in loops if "f32[8,128]" in shapes)
    assert "f32[256,8]" in loop
    assert "f32[32,128]" not in loop and "f32[256,32]" not in loop
    assert "all-gather" in text
    assert "all-to-all" not in text and "collective-permute" not in text


def test_a_batch_that_does_not_divide_over_devices_and_micro_batches_is_refused():
    with pytest.raises(ValueError, match="8 devices in 8 micro-batches; choose a multiple of 64"):
        assemble(jax.devices(), 8, "adamw")
