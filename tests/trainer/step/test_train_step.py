"""The training step: what it hands to the optimizer on steps that sample curvature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
from models import DecoderConfig
from sophia_optax import gauss_newton_bartlett, hutchinson, sophia_g
from train.step.batch import next_tokens
from train.step.loss import outputs_of
from train.step.train_step import init_state, make_step

MODEL = models.split(DecoderConfig(vocab_size=32, context=8, width=8, layers=1, heads=2))
ESTIMATORS = {
    "sophia-g": gauss_newton_bartlett(),
    "sophia-g in groups": gauss_newton_bartlett(groups=4, parallel_groups=2),
    "sophia-g on half": gauss_newton_bartlett(groups=2, batch_fraction=0.5),
    "sophia-h": hutchinson(),
    "sophia-h on half": hutchinson(batch_fraction=0.5),
}


def forbidden(*args, **extra):
    raise AssertionError("the optimizer sampled curvature though the step did")


def make(estimator, shared, interval=2):
    """(step, initial state); `shared` is what the step itself may sample with."""
    optimizer = sophia_g(1e-3, estimator=estimator, update_interval=interval, seed=5)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    step = make_step(outputs_of(MODEL), tx, estimator=shared, seed=5)
    init = functools.partial(init_state, MODEL.init, tx, 0)
    return jax.jit(step, static_argnames="refresh"), jax.jit(init)


def two_steps(step, init, refreshes):
    """The last state and metrics."""
    state = init()
    batches = np.random.default_rng(0).integers(32, size=(2, 8, 9))
    for batch, refresh in zip(batches, refreshes, strict=True):
        state, metrics = step(state, next_tokens(jnp.asarray(batch)), refresh=refresh)
    return state, metrics


@pytest.mark.parametrize(
    ("name", "refreshes"),
    [
        ("sophia-g", (True, False)),
        ("sophia-h on half", (None, None)),
        pytest.param("sophia-g in groups", (None, None), marks=pytest.mark.slow),
        pytest.param("sophia-g on half", (True, False), marks=pytest.mark.slow),
        pytest.param("sophia-h", (True, False), marks=pytest.mark.slow),
    ],
)
def test_the_step_takes_the_sample_that_the_optimizer_would_draw(name, refreshes):
    """At the same seed and count, of the forward pass that gives loss and gradient."""
    estimator, interval = ESTIMATORS[name], 1 if None in refreshes else 2
    have = two_steps(*make(forbidden, estimator, interval), refreshes)
    want = two_steps(*make(estimator, None, interval), refreshes)
    assert jax.tree.structure(have) == jax.tree.structure(want)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(near, have, want)
    assert optax.tree.get(have[0].opt_state, "accepted") == 2 / interval
