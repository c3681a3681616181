"""diagnostics: a flat dict of scalars from an optimizer state of any nesting."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_optax import clip_by_ratio, diagnostics, floor, hessian_estimate, sophia_h

NAMES = {
    "clipped_fraction",
    "win_rate",
    "floored_fraction",
    "hessian_age",
    "hessian_accepted",
    "hessian_rejected",
}
PARAMS = {"w": jnp.zeros(4), "v": jnp.zeros((2, 3))}
GRADS = {"w": jnp.array([2.0, 2.0, 0.1, 2.0]), "v": jnp.full((2, 3), 0.1)}
SAMPLE = {"w": jnp.array([1.0, 1.0, 1.0, -1.0]), "v": jnp.ones((2, 3))}
ARGUMENTS = {"learning_rate": 0.1, "b1": 0.0, "gamma": 1.0}

MASK = {"w": True, "v": False}
WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx, optax.scale(2.0)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "v": True}, mask_compatible_extra_args=True),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "sgd": optax.sgd(1.0)},
        {"w": "ours", "v": "ours"},
        mask_compatible_extra_args=True,
    ),
}


def state_after(tx, hessian=SAMPLE, **extra):
    return tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian=hessian, **extra)[1]


def assert_scalars(found, names=NAMES):
    assert set(found) == set(names)
    for name, value in found.items():
        assert value.shape == () and value.dtype == np.float32, name


@pytest.mark.parametrize("name", ["plain", "inject_hyperparams", *WRAPPERS])
def test_ten_coordinates_nine_live_two_clipped_in_every_wrapper(name):
    if name == "inject_hyperparams":
        static = ("estimator", "weight_decay_mask")
        tx = optax.inject_hyperparams(sophia_h, static_args=static)(**ARGUMENTS)
    else:
        tx = WRAPPERS.get(name, lambda tx: tx)(sophia_h(**ARGUMENTS))
    found = diagnostics(state_after(tx))
    assert_scalars(found)
    expected = {
        "clipped_fraction": 2 / 9,
        "win_rate": 7 / 9,
        "floored_fraction": 1 / 10,
        "hessian_age": 0,
        "hessian_accepted": 1,
        "hessian_rejected": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_age_counts_updates_since_the_last_sample_and_rejections_are_counted():
    tx = sophia_h(**ARGUMENTS)
    state = state_after(tx)
    _, state = tx.update(GRADS, state, PARAMS, refresh=False)
    bad = jax.tree.map(lambda x: x * jnp.nan, SAMPLE)
    _, state = tx.update(GRADS, state, PARAMS, hessian=bad)
    found = diagnostics(state)
    assert (found["hessian_age"], found["hessian_rejected"], found["hessian_accepted"]) == (2, 1, 1)


def test_two_instances_have_distinct_names():
    tx = optax.partition(
        {"x": sophia_h(0.1), "y": sophia_h(0.2, clip_threshold=0.5)},
        {"w": "x", "v": "y"},
        mask_compatible_extra_args=True,
    )
    found = diagnostics(state_after(tx))
    assert len(found) == 2 * len(NAMES)
    assert {name.rsplit(".", 1)[1] for name in found} == NAMES
    assert sum("'x'" in name for name in found) == sum("'y'" in name for name in found) == 6


@pytest.mark.parametrize("off", [{"statistics": False}, {"clip_threshold": None}])
def test_without_statistics_the_curvature_is_still_described(off):
    found = diagnostics(state_after(sophia_h(**ARGUMENTS, **off)))
    assert_scalars(found, {n for n in NAMES if n.startswith("hessian")})


def test_a_hessian_estimate_alone_is_described():
    tx = optax.chain(hessian_estimate(None), optax.scale(-1.0))
    assert_scalars(diagnostics(state_after(tx)), {n for n in NAMES if n.startswith("hessian")})


def test_optimizers_without_curvature_have_none():
    for tx in (optax.adamw(0.1), optax.contrib.sophia(0.1), optax.sgd(0.1)):
        assert diagnostics(tx.init(PARAMS)) == {}


def test_parameters_named_like_our_fields_are_not_confused():
    Params = collections.namedtuple("Params", ["clipped", "age"])
    params = {
        "clipped": jnp.ones(3),
        "age": {"h": jnp.ones(2), "floored": jnp.ones(1)},
        "accepted": Params(jnp.ones(2), jnp.ones(4)),
    }
    tx = sophia_h(**ARGUMENTS)
    _, state = tx.update(params, tx.init(params), params, hessian=params)
    found = diagnostics(state)
    assert_scalars(found)
    assert found["hessian_accepted"] == 1


def test_a_state_fetched_to_the_host_reads_the_same():
    state = state_after(sophia_h(**ARGUMENTS))
    found = diagnostics(jax.device_get(state))
    assert_scalars(found)
    assert found == diagnostics(state)


def test_it_runs_inside_jit():
    state = state_after(sophia_h(**ARGUMENTS))
    assert jax.jit(diagnostics)(state) == diagnostics(state)


def test_a_custom_composition_is_described():
    tx = clip_by_ratio(
        optax.trace(0.9), hessian_estimate(None), denominator=floor(1.0), clip_threshold=1.0
    )
    assert_scalars(diagnostics(state_after(tx)))
