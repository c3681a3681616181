"""Every optimizer of the command line: its flags, its schedule, its programs, its samples."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_close

import sophia_optax
from train.config.presets import preset
from train.optimizers.base import BuiltOptimizer, Due, TrainContext, clip_first, clipped
from train.optimizers.layerwise import dimension_numbers, matrices
from train.optimizers.registry import OPTIMIZERS, SophiaG, SophiaH
from train.optimizers.sophia import parallel_groups

DECAYING = [name for name in OPTIMIZERS if hasattr(preset("tiny", name).optim, "weight_decay")]
ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
PARAMS = {"matrix": jnp.full((4, 6), 0.1), "vector": jnp.full(6, 0.2)}


def logits_fn(params, rows):
    return rows @ params["matrix"] + params["vector"]


def obj_fn(params, rows):
    return jnp.mean(jnp.cosh(logits_fn(params, rows)) ** 2)


def gradient(random):
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), PARAMS)


def context(rate=1.0, steps=10, seed=0, devices=1):
    rows = len(ROWS)
    return TrainContext(lambda _: rate, seed, steps, rows, row_devices=devices)


def updates_of(optim, *, steps=3, rate=0.5, total_steps=8, by_host=True):
    built = optim.build(context(rate, total_steps))
    return follow(built, steps, by_host)


def follow(built, steps=3, by_host=True):
    """The leaves of each update and of the last state, along a fixed path of gradients."""
    tx, random, updates = optax.with_extra_args_support(built.tx), np.random.default_rng(1), []
    state = tx.init(PARAMS)
    for step in range(steps):
        grads, extra = gradient(random), {"value": 2 - step / 9}
        if built.sampling:
            extra["hessian"] = jax.tree.map(jnp.square, gradient(random))
        if by_host:
            extra |= built.due(step)._asdict()
        direction, state = tx.update(grads, state, PARAMS, **extra)
        updates.append(direction)
    return jax.tree.leaves((updates, state))


def same(a, b):
    return len(a) == len(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True)
    )


def another(field, value):
    """A value that the field may have, and has not."""
    if typing.get_origin(field.type) is typing.Literal:
        return next(choice for choice in typing.get_args(field.type) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2
    return {"clipping_threshold": 1.5, "batch_fraction": 0.5}.get(field.name, 0.3)


# Where presets clip or floor every coordinate, nothing else would show.
UNCLIPPED = {
    "sophia-g": {"gamma": 20.0, "update_interval": 6},  # an amortized sample needs 6 rows then
    "sophia-h": {"gamma": 20.0, "update_interval": 6},
    "sophia-geometric": {"rho": 200.0},
}
SAMPLING = {"groups", "num_samples", "batch_fraction", "probe"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_field_changes_the_updates_or_the_state(optimizer):
    optim = dataclasses.replace(preset("tiny", optimizer).optim, **UNCLIPPED.get(optimizer, {}))
    before = updates_of(optim)
    for field in dataclasses.fields(optim):
        if field.name not in SAMPLING | {"learning_rate"}:
            change = {field.name: another(field, getattr(optim, field.name))}
            assert not same(before, updates_of(dataclasses.replace(optim, **change))), change


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_every_field_of_an_estimator_changes_the_sample(kind):
    def sample(optim):
        extra = {"obj_fn": obj_fn, "logits_fn": logits_fn, "inputs": ROWS}
        estimate = functools.partial(optim.plan(context()).estimator, updates=None, **extra)
        leaves = jax.tree.leaves(jax.jit(estimate)(jax.random.key(0), PARAMS))
        return np.concatenate([np.ravel(x) for x in leaves])

    own = kind(update_interval=6)  # an amortized sample needs as many rows
    before = sample(own)
    for field in dataclasses.fields(kind):
        if field.name in SAMPLING | {"amortize"}:
            change = {field.name: another(field, getattr(own, field.name))}
            gap = np.abs(sample(dataclasses.replace(own, **change)) - before).max()
            assert gap > 1e-3 * np.abs(before).max(), change  # more than programs round apart


@pytest.mark.parametrize("optimizer", DECAYING)
def test_weight_decay_is_times_the_learning_rate_and_moves_matrices_only(optimizer):
    optim = dataclasses.replace(preset("tiny", optimizer).optim, weight_decay=0.5)
    tx = optax.with_extra_args_support(optim.build(context(0.25)).tx)
    zeros = optax.tree.zeros_like(PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS, hessian=PARAMS, refresh=True)
    np.testing.assert_allclose(updates["matrix"], -0.5 * 0.25 * PARAMS["matrix"], rtol=1e-6)
    assert jnp.all(updates["vector"] == 0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_as_long_as_the_schedule_says(optimizer):
    optim = preset("tiny", optimizer).optim
    one, two = (updates_of(optim, steps=1, rate=rate)[:2] for rate in (0.5, 1.0))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(2 * a, b, rtol=1e-6)


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("optimizer", ["sophia-lite", "orthosoph"])
def test_refreshes_chosen_on_the_host_are_those_of_the_counter(optimizer, interval):
    optim = dataclasses.replace(preset("tiny", optimizer).optim, update_interval=interval)
    assert same(updates_of(optim), updates_of(optim, by_host=False))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_there_are_two_programs_where_an_interval_is_longer_than_one_step(optimizer):
    optim = preset("tiny", optimizer).optim
    if not hasattr(optim, "update_interval"):
        assert {optim.build(context()).due(step) for step in range(7)} == {Due(None, None)}
        return
    for interval, flags in {1: [None] * 4, 3: [True, False, False, True]}.items():
        chosen = dataclasses.replace(optim, update_interval=interval).build(context())
        kind = "renew" if optimizer == "orthosoph" else "refresh"
        assert [getattr(chosen.due(step), kind) for step in range(4)] == flags


def test_curvature_and_roots_have_intervals_of_their_own():
    built = BuiltOptimizer(optax.identity(), refresh_interval=2, renew_interval=3)
    due = [built.due(step) for step in range(4)]
    assert [kind.refresh for kind in due] == [True, False, True, False]
    assert [kind.renew for kind in due] == [True, False, False, True]


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h", "sophia-lite", "sophia-geometric"])
def test_state_dtypes_reach_every_moment(optimizer):
    flags = {"mu_dtype": "bfloat16", "hessian_dtype": "bfloat16"}
    optim = dataclasses.replace(preset("tiny", optimizer).optim, **flags)
    state = optim.build(context()).tx.init(PARAMS)
    moments = [x.dtype for x in jax.tree.leaves(state) if x.shape == PARAMS["matrix"].shape]
    assert moments == [jnp.bfloat16] * 2


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h", "sophia-lite", "sophia-geometric"])
def test_the_seed_decides_what_is_random(optimizer):
    optim = dataclasses.replace(preset("tiny", optimizer).optim, hessian_dtype="bfloat16")
    extra = {"obj_fn": obj_fn, "logits_fn": logits_fn, "inputs": ROWS}

    def state(seed):
        tx = optim.build(context(seed=seed)).tx
        return jax.tree.leaves(tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra)[1])

    assert not same(state(0), state(1))


def test_the_radius_of_soaa_closes_in_over_the_steps_of_the_run():
    optim = preset("tiny", "soaa").optim
    fields = dataclasses.asdict(optim)
    fields |= {"learning_rate": lambda _: 0.5, "weight_decay_mask": matrices}
    runs = {total: updates_of(optim, total_steps=total) for total in (8, 80)}
    assert not same(*runs.values())
    for total, run in runs.items():
        assert same(run, follow(BuiltOptimizer(sophia_optax.soaa(**fields, total_steps=total))))


@pytest.mark.parametrize(
    ("groups", "devices", "parallel"),
    [(1, 8, 1), (2, 2, 2), (3, 2, 1), (3, 8, 1), (0, 3, 6), (0, 8, 8), (2, 8, 1)],
)
def test_the_estimator_of_sophia_g_is_the_same_on_any_number_of_devices(groups, devices, parallel):
    """Side by side go groups that devices divide, and single rows; no groups are one a row."""
    optim = SophiaG(groups=groups, batch_fraction=1.0, num_samples=2)
    plan = optim.plan(context(devices=devices))
    assert plan.parallel_groups == parallel
    direct = sophia_optax.gauss_newton_bartlett(groups=groups or 6, num_samples=2)
    samples = [
        estimator(jax.random.key(3), PARAMS, None, logits_fn=logits_fn, inputs=ROWS)
        for estimator in (plan.estimator, direct)
    ]
    assert_close(*samples, rtol=1e-6)


def test_above_eight_groups_a_device_they_go_in_rounds():
    assert parallel_groups(16, 1, 2) == 16
    assert parallel_groups(18, 1, 2) == 2
    assert parallel_groups(34, 1, 4) == 4


@pytest.mark.parametrize(("groups", "parallel", "rounds"), [(8, 8, 1), (6, 4, 2), (5, 1, 5)])
def test_rounds_hold_all_groups(groups, parallel, rounds):
    plan = SophiaG().plan(context())._replace(groups=groups, parallel_groups=parallel)
    assert plan.rounds == rounds


@pytest.mark.parametrize(
    ("groups", "share", "accumulation", "each"),
    [(8, 1, 1, 8), (8, 1, 4, 2), (8, 1 / 2, 4, 4), (1, 1, 4, 1), (0, 1, 4, 12), (0, 1 / 8, 2, 6)],
)
def test_groups_of_the_batch_are_shared_by_its_sampled_micro_batches(
    groups, share, accumulation, each
):
    """Of 48 rows; groups of 0 are single rows."""
    optim = SophiaG(groups=groups, batch_fraction=share)
    assert optim.groups_of(48, accumulation) == each


@pytest.mark.parametrize(
    ("number", "accumulation", "strides"), [(1, 4, (1, 1)), (2, 4, (2, 1)), (8, 2, (2, 4))]
)
def test_the_rows_of_a_sample_are_every_nth_of_the_batch(number, accumulation, strides):
    """Whether whole micro-batches are taken, or parts of one."""
    every, stride = SophiaG(batch_fraction=1 / number).strides(48, accumulation)
    assert (every, stride) == strides
    taken = [
        row
        for first in range(0, accumulation, every)
        for row in range(first, 48, accumulation * stride)
    ]
    assert sorted(taken) == list(range(0, 48, number))


def rate(_):
    return 0.5


DECAYS = {"b1": 0.7, "b2": 0.9}
OF_OPTAX = {  # fields of the config -> the transformation that they mean
    "adam": (DECAYS, optax.adam(rate, **DECAYS, eps=1e-8)),
    "adamw": (DECAYS, optax.adamw(rate, **DECAYS, eps=1e-8, weight_decay=0.3, mask=matrices)),
    "lion": (DECAYS, optax.lion(rate, **DECAYS, weight_decay=0.3, mask=matrices)),
    "sgd": ({"momentum": 0.7}, optax.sgd(rate, momentum=0.7, nesterov=False)),
    "muon": (
        {"beta": 0.7, "consistent_rms": 0.1},
        optax.contrib.muon(
            rate,
            beta=0.7,
            consistent_rms=0.1,
            weight_decay=0.3,
            weight_decay_mask=matrices,
            muon_weight_dimension_numbers=dimension_numbers,
        ),
    ),
}


@pytest.mark.parametrize("optimizer", OF_OPTAX)
def test_fields_are_the_arguments_of_optax_that_have_their_names(optimizer):
    fields, want = OF_OPTAX[optimizer]
    if hasattr(OPTIMIZERS[optimizer], "weight_decay"):
        fields = fields | {"weight_decay": 0.3}
    have = OPTIMIZERS[optimizer](**fields).build(context(0.5)).tx
    assert same(follow(BuiltOptimizer(have)), follow(BuiltOptimizer(want)))


def test_muon_makes_matrices_as_long_as_its_root_mean_square_says():
    optim = OPTIMIZERS["muon"](consistent_rms=0.1, weight_decay=0.0)
    params = {"matrix": jnp.zeros((8, 8))}
    tx = optim.build(context(1.0)).tx
    step, _ = tx.update({"matrix": jnp.eye(8)}, tx.init(params), params)
    assert jnp.sqrt(jnp.mean(step["matrix"] ** 2)) == pytest.approx(0.1, rel=0.3)


def test_gradients_are_clipped_before_the_optimizer_sees_them():
    clip = TrainContext(rate, max_grad_norm=1.0)
    large, unit = {"w": jnp.array([30.0, 40.0])}, {"w": jnp.array([0.6, 0.8])}
    for made in (clip_first(optax.scale(5.0), clip), clipped(optax.scale(5.0), clip).tx):
        step, _ = made.update(large, made.init(unit))
        np.testing.assert_allclose(step["w"], 5 * unit["w"], rtol=1e-6)
    assert clip_first(made, TrainContext(rate)) is made


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_gets_the_clipped_gradient(optimizer):
    """A gradient ten times as long, clipped to its own norm, makes the same first step."""
    optim = preset("tiny", optimizer).optim
    grads = gradient(np.random.default_rng(2))
    norm = float(optax.tree.norm(grads))
    tx = optim.build(context()._replace(max_grad_norm=norm)).tx
    tx = optax.with_extra_args_support(tx)
    extra = {"hessian": PARAMS} if optimizer in ("sophia-g", "sophia-h") else {}
    short, long = (
        tx.update(optax.tree.scale(n, grads), tx.init(PARAMS), PARAMS, value=2.0, **extra)[0]
        for n in (1 - 1e-6, 10)
    )
    assert_close(long, short, rtol=1e-3, atol=1e-6)


def test_a_step_renews_what_skipped_steps_owe_and_no_more():
    built = BuiltOptimizer(optax.identity(), refresh_interval=10, renew_interval=25)
    assert built.due(11, pending=Due(True, False)) == Due(True, False)
    assert built.due(25, pending=Due(True, False)) == Due(True, True)
    assert BuiltOptimizer(optax.identity()).due(11, pending=Due(True, True)) == Due(None, None)
