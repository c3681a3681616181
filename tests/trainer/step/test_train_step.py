"""The training step: what it hands to the optimizer on steps that sample curvature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
import sophia_optax
from models import DecoderConfig
from sophia_optax import gauss_newton_bartlett, hutchinson, sophia_g
from train.optimizers.base import Due, SamplingPlan
from train.step.batch import next_tokens
from train.step.loss import mean_loss, outputs_of
from train.step.train_step import TrainState, init_state, make_step

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


def transformation(estimator, interval):
    optimizer = sophia_g(1e-3, estimator=estimator, update_interval=interval, seed=5)
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def make(estimator, interval=2):
    """(step, initial state); the step samples, and the optimizer must not."""
    tx = transformation(forbidden, interval)
    sampling = SamplingPlan(estimator, 1, 1, 1, 1, 1, "backward")
    step = make_step(outputs_of(MODEL), tx, sampling=sampling, seed=5)
    return jax.jit(step, static_argnames="due"), initial(tx)


def make_by_optimizer(estimator, interval=2):
    """The same, where the optimizer samples by itself."""
    tx, outputs = transformation(estimator, interval), outputs_of(MODEL)

    def obj_fn(params, batch):
        return mean_loss(outputs(params, batch), batch)

    def step(state, batch, due):
        loss, grads = jax.value_and_grad(obj_fn)(state.params, batch)
        extra = {"obj_fn": obj_fn, "logits_fn": outputs, "inputs": batch, "value": loss}
        update = tx.update(grads, state.opt_state, state.params, refresh=due.refresh, **extra)
        params = optax.apply_updates(state.params, update[0])
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "skipped": jnp.zeros([])}
        metrics |= sophia_optax.diagnostics(update[1])
        return TrainState(state.step + 1, params, update[1]), metrics

    return jax.jit(step, static_argnames="due"), initial(tx)


def initial(tx):
    return jax.jit(functools.partial(init_state, MODEL.init, tx, 0))


def two_steps(step, init, refreshes):
    """The last state and metrics."""
    state = init()
    batches = np.random.default_rng(0).integers(32, size=(2, 8, 9))
    for batch, refresh in zip(batches, refreshes, strict=True):
        state, metrics = step(state, next_tokens(jnp.asarray(batch)), due=Due(refresh))
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
    have = two_steps(*make(estimator, interval), refreshes)
    want = two_steps(*make_by_optimizer(estimator, interval), refreshes)
    assert jax.tree.structure(have) == jax.tree.structure(want)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(near, have, want)
    assert optax.tree.get(have[0].opt_state, "accepted") == 2 / interval


def test_the_step_tells_soaa_the_loss_by_which_its_radius_moves():
    """Three steps are those of the library called by hand."""
    tx = sophia_optax.soaa(0.02, b1=0.5, total_steps=3)
    step = jax.jit(make_step(outputs_of(MODEL), tx))
    state = initial(tx)()
    params, opt_state = state.params, state.opt_state

    @jax.jit
    def by_hand(params, opt_state, batch):
        value, grads = jax.value_and_grad(lambda p: mean_loss(MODEL.apply(p, batch.inputs), batch))(
            params
        )
        updates, opt_state = tx.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    for tokens in np.random.default_rng(0).integers(32, size=(3, 8, 9)):
        batch = next_tokens(jnp.asarray(tokens))
        state, _ = step(state, batch)
        params, opt_state = by_hand(params, opt_state, batch)
    have, want = (optax.tree.get(s, "radius") for s in (state.opt_state, opt_state))
    assert have == pytest.approx(float(want), rel=1e-3) and abs(have - 1) > 1e-2
    near = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(near, state.params, params)


def test_the_optimizer_is_told_what_is_due():
    told = []

    def update(updates, state, params=None, **extra):
        told.append(extra)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    step = functools.partial(make_step(outputs_of(MODEL), tx), due=Due(True, False))
    batch = next_tokens(jnp.zeros((8, 9), jnp.int32))
    jax.eval_shape(step, jax.eval_shape(initial(tx)), batch)
    assert [(x["refresh"], x["renew"], x["hessian"]) for x in told] == [(True, False, None)]
    assert told[0]["value"].shape == ()
