"""trust_region inside optax's wrappers, against the oracle on the same losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles as o
from paths import GRADS, PARAMS, SHAPES, STEPS, assert_equal_paths, cast, ours, row, theirs
from regions import LR, T, every_rule, region

from sophia_optax import soaa

LOSSES = 3 - 0.01 * np.arange(STEPS) + 0.15 * np.random.default_rng(7).normal(size=STEPS)


def adam_region(**arguments):
    return region(optax.scale_by_adam(b2=0.9), **arguments)


def descent(tx):
    return optax.chain(tx, optax.scale_by_learning_rate(LR))


def radius_of(state):
    return {"radius": optax.tree.get(state, "radius")}


def assert_path(tx, oracle, grads=GRADS, dtype="float64", names=SHAPES, value=LOSSES):
    expected = theirs(oracle, grads, watch=lambda o: {"radius": o.dt}, value=value)
    expected = {n: expected[n] for n in (*names, "radius")}
    with jax.enable_x64(dtype == "float64"):
        path, _ = ours(tx, dtype, watch=radius_of, value=value)
        assert_equal_paths(path, expected, dtype, rtol={"float64": 1e-10, "float32": 3e-5}[dtype])


def adam_oracle(rule="soaa"):
    return o.TrustRegion(o.Adam(0, b2=0.9), LR, total_steps=T, rule=rule)


def test_behind_a_global_clip_the_region_sees_the_clipped_gradient():
    def clipped(t):
        g = row(GRADS, t)
        return o.tree(lambda x: x / max(1.0, o.global_norm(g)), g)

    rows = [clipped(t) for t in range(STEPS)]
    grads = {n: np.stack([g[n] for g in rows]) for n in SHAPES}
    tx = optax.chain(optax.clip_by_global_norm(1.0), adam_region(), optax.scale(-LR))
    assert_path(tx, adam_oracle(), grads)


def test_behind_a_mask_the_sums_are_those_of_its_part():
    """The rest of the tree counts as if its gradient were zero."""
    mask = {n: n == "matrix" for n in SHAPES}
    grads = {n: g if n == "matrix" else 0 * g for n, g in GRADS.items()}
    tx = optax.chain(optax.masked(adam_region(), mask), optax.scale_by_learning_rate(LR))
    assert_path(tx, adam_oracle(), grads, names=["matrix"])


def test_regions_in_a_partition_have_radii_of_their_own():
    labels = {n: n if n == "matrix" else "rest" for n in SHAPES}
    tx = descent(optax.partition({"matrix": adam_region(), "rest": adam_region()}, labels))
    with jax.enable_x64(True):
        path, state = ours(tx, "float64", value=LOSSES)
    for part, inside in state[0].inner_states.items():
        grads = {n: g if labels[n] == part else 0 * g for n, g in GRADS.items()}
        oracle = adam_oracle()
        expected = theirs(oracle, grads, value=LOSSES)
        names = [n for n in SHAPES if labels[n] == part]
        assert_equal_paths(path, {n: expected[n] for n in names}, "float64", rtol=1e-10)
        np.testing.assert_allclose(optax.tree.get(inside, "radius"), oracle.dt, rtol=1e-10)


@every_rule
def test_multi_steps_moves_on_the_last_micro_step_by_its_loss(rule):
    """Micro-batches differ; their mean gradient is the batch's, their mean loss is the caller's."""
    tx = optax.MultiSteps(descent(adam_region(rule=rule)), every_k_schedule=2)
    params, oracle, expected = cast(PARAMS, "float32"), adam_oracle(rule), PARAMS
    state, step = tx.init(params), jax.jit(tx.update)
    for t in range(8):
        expected = oracle.step(expected, row(GRADS, t), value=LOSSES[t])
        for share, value in ((0.5, 100.0), (1.5, LOSSES[t])):
            g = cast(o.tree(lambda x: share * x, row(GRADS, t)), "float32")  # noqa: B023
            updates, state = step(g, state, params, value=jnp.asarray(value))
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(optax.tree.get(state, "radius"), oracle.dt, rtol=1e-5)
    assert_equal_paths(params, expected, "float32", rtol=1e-4)


@every_rule
def test_injected_schedules_of_every_number_are_the_numbers(rule):
    numbers = {"learning_rate": 0.1, "total_steps": T, "b1": 0.8, "b2": 0.95}
    numbers |= {"gamma": 0.4, "eps": 1e-3, "weight_decay": 0.3}
    factory = optax.inject_hyperparams(
        soaa, static_args=("rule", "weight_decay_mask"), hyperparam_dtype=jnp.float32
    )
    tx = factory(**{n: lambda _, x=x: x for n, x in numbers.items()}, rule=rule)
    oracle = {"soaa": o.SOAA, "tadam": o.Tadam}[rule](**numbers)
    assert_path(tx, oracle, dtype="float32")
