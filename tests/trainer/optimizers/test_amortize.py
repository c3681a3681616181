"""A sample amortized over an interval: the same memory and operations, even steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
from models import DecoderConfig
from sophia_optax import gauss_newton_bartlett, hutchinson, sophia_g, sophia_h
from train.optimizers.base import Due, TrainContext
from train.optimizers.layerwise import probe
from train.optimizers.sophia import SophiaG, SophiaH
from train.step.batch import next_tokens
from train.step.loss import mean_loss, outputs_of
from train.step.train_step import init_state, make_step

ROWS, SEED, INTERVAL = 16, 5, 4
MODEL = models.split(DecoderConfig(vocab_size=32, context=8, width=8, layers=1, heads=2))
OUTPUTS = outputs_of(MODEL)
TOKENS = np.random.default_rng(0).integers(32, size=(INTERVAL, ROWS, 9))
BATCHES = [next_tokens(jnp.asarray(tokens)) for tokens in TOKENS]
CONTEXT = TrainContext(lambda _: 1e-2, seed=SEED, batch_size=ROWS)
CHANGED = {"update_interval": INTERVAL, "batch_fraction": 0.5, "b2": 0.9}
CONFIGS = {
    "sophia-g": SophiaG(amortize=True, groups=0, **CHANGED),
    "sophia-h": SophiaH(amortize=True, **CHANGED),
}
SLICES = {
    "sophia-g": gauss_newton_bartlett(groups=2, batch_fraction=0.5 / INTERVAL),
    "sophia-h": hutchinson(batch_fraction=0.5 / INTERVAL, probe=probe("rademacher")),
}
EXTRA = {
    "logits_fn": OUTPUTS,
    "obj_fn": lambda params, batch: mean_loss(OUTPUTS(params, batch), batch),
}


def make(optim):
    """(step, initial state)."""
    tx, sampling, *_ = optim.build(CONTEXT)
    step = make_step(OUTPUTS, tx, sampling=sampling, seed=SEED)
    return step, jax.jit(functools.partial(init_state, MODEL.init, tx, 0))()


def estimate(state):
    return optax.tree.get(state, "HessianEstimateState")


@pytest.mark.parametrize("name", ["sophia-g", pytest.param("sophia-h", marks=pytest.mark.slow)])
def test_h_averages_a_slice_of_each_step(name):
    """Each a sample of every eighth row with d^4 = b2: four steps weigh what one did."""
    step, state = make(CONFIGS[name])
    step, decay = jax.jit(step, static_argnames="due"), 0.9 ** (1 / INTERVAL)
    sample = jax.jit(lambda *at, inputs: SLICES[name](*at, None, inputs=inputs, **EXTRA))
    h = jax.tree.map(lambda p: np.zeros(p.shape), state.params)
    for number, batch in enumerate(BATCHES):
        key = jax.random.fold_in(jax.random.key(SEED), number)
        new = sample(key, state.params, inputs=batch)
        h = jax.tree.map(lambda h, x: decay * h + (1 - decay) * np.float64(x), h, new)
        state, _ = step(state, batch, due=CONFIGS[name].build(CONTEXT).due(number))
        near = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-8)
        jax.tree.map(near, estimate(state.opt_state).h, h)
    np.testing.assert_allclose(estimate(state.opt_state).mass, 1 - 0.9, rtol=1e-6)
    assert estimate(state.opt_state).accepted == INTERVAL


def test_all_steps_share_one_program():
    built = [optim.build(CONTEXT) for optim in CONFIGS.values()]
    assert {each.due(step) for each in built for step in range(9)} == {Due(None, None)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_library_spells_it_with_an_interval_of_one(name):
    """And b2 ** (1 / k), and the k-th part of the share; both sample at each update."""
    alias = {"sophia-g": sophia_g, "sophia-h": sophia_h}[name]
    decay = 0.9 ** (1 / INTERVAL)
    spelt = alias(1e-2, update_interval=1, b2=decay, seed=SEED, estimator=SLICES[name])
    made = CONFIGS[name].build(CONTEXT).tx
    params = jax.jit(MODEL.init)(jax.random.key(0))

    def two_updates(tx):
        state = tx.init(params)
        for batch in BATCHES[:2]:
            _, state = tx.update(params, state, params, inputs=batch, **EXTRA)
        return estimate(state)

    have, want = jax.jit(lambda: (two_updates(made), two_updates(spelt)))()
    assert have.accepted == 2
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), have, want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_the_steps_of_an_interval_cost_what_they_did_together(kind):
    """Operations of k even steps, and of k - 1 plain ones and one that samples the whole share."""

    def operations(optim, refresh):
        step, state = make(optim)
        lowered = jax.jit(step, static_argnums=2).lower(state, BATCHES[0], Due(refresh))
        return lowered.cost_analysis()["flops"]

    even = operations(kind(amortize=True, **CHANGED), None)
    plain, refresh = (operations(kind(**CHANGED), refresh) for refresh in (False, True))
    assert refresh > 1.2 * plain
    np.testing.assert_allclose(INTERVAL * even, (INTERVAL - 1) * plain + refresh, rtol=0.05)
