import dataclasses
import functools
import json
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_close

import sophia_optax
from models import PRESETS
from train import baseline
from train.config import schema, serialize
from train.config.presets import preset
from train.optimizers.baselines import AdamW
from train.optimizers.layerwise import matrices
from train.optimizers.registry import OPTIMIZERS, SophiaG, SophiaH, name_of, refresh_due


@pytest.mark.parametrize(
    ("names", "nearest"),
    [
        (("tinny",), "tiny"),
        (("gpt2-120m",), "gpt2-125m"),
        (("tiny", "sofia-g"), "sophia-g"),
        (("tiny", "sofia"), "sophia-g"),
        (("tiny", "sophia-geo"), "sophia-geometric"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(names, nearest):
    with pytest.raises(ValueError, match=f"Did you mean {nearest}"):
        preset(*names)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["tiny", "gpt2-355m"])
def test_a_config_survives_json(model, optimizer, tmp_path):
    run = preset(model, optimizer)
    serialize.save(run, tmp_path)
    assert serialize.load(tmp_path) == run


def test_a_changed_model_keeps_its_name():
    run = preset("gpt2-125m", "adamw")
    changed = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="bfloat16"))
    assert changed.name == "gpt2-125m-adamw"


@pytest.mark.parametrize("field", ["log_every", "checkpoint_every", "keep_checkpoints"])
def test_an_interval_of_zero_is_refused_by_name(field):
    with pytest.raises(ValueError, match=rf"output\.{field}=0 must be at least 1"):
        schema.OutputConfig(**{field: 0})


def test_published_sizes_have_the_published_hyperparameters():
    sizes = [preset(f"gpt2-{size}", "sophia-g").optim for size in ("125m", "355m", "770m")]
    assert [(o.learning_rate, o.gamma) for o in sizes] == [(6e-4, 0.05), (7e-4, 0.08), (3e-4, 0.05)]
    adamw = [preset(f"gpt2-{size}", "adamw").optim for size in ("125m", "355m", "770m")]
    assert [o.learning_rate for o in adamw] == [6e-4, 3e-4, 2e-4]


def test_the_schedule_warms_up_to_the_peak_and_ends_at_the_final_share():
    run = dataclasses.replace(preset("tiny", "adamw"), steps=100, warmup_steps=10)
    rates = [float(run.schedule(step)) for step in (0, 10, 100)]
    peak = run.optim.learning_rate
    assert rates == pytest.approx([0, peak, 0.05 * peak])


def test_the_hash_follows_what_changes_the_result_and_nothing_else():
    run = preset()
    elsewhere = dataclasses.replace(
        run,
        output=dataclasses.replace(run.output, folder="elsewhere"),
        mesh=dataclasses.replace(run.mesh, fsdp=4),
    )
    assert elsewhere.hash == run.hash
    assert dataclasses.replace(run, seed=1).hash != run.hash
    gamma = dataclasses.replace(run, optim=dataclasses.replace(run.optim, gamma=0.7))
    assert gamma.hash != run.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"sequence_length": 65}, "longer than the model's context of 64"),
        ({"steps": 50, "warmup_steps": 50}, "less than steps=50.* give --warmup-steps too"),
        ({"start_from": "gs://bucket/run"}, "--start-from gs://bucket/run is an address"),
        ({"gradient_clip": -1.0}, "gradient_clip=-1.0"),
        ({"gradient_clip": math.nan}, "--gradient-clip nan is not a finite number"),
        ({"final_learning_rate": -3.0}, "final_learning_rate=-3.0 is a share"),
        ({"loss_chunk": -1}, "loss_chunk=-1 is negative"),
        ({"optim": AdamW(b1=1.0)}, "--optim.b1 1.0 is no decay"),
        ({"optim": AdamW(b2=math.nan)}, "--optim.b2 nan is not a finite number"),
        ({"optim": AdamW(weight_decay=math.inf)}, "--optim.weight-decay inf is not a fin"),
        ({"optim": AdamW(learning_rate=-1.0)}, "--optim.learning-rate -1.0 is negative"),
    ],
)
def test_a_config_that_cannot_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset(), **change)


def test_a_folder_without_a_run_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        serialize.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        serialize.load(tmp_path / "missing")


def test_an_unreadable_config_says_where_and_why(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        serialize.load(tmp_path)


def changed(*path, to):
    fields = json.loads(json.dumps(serialize.to_json(preset())))
    inner = fields
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "KeyError: 'base'"),
        ([], "holds \\[\\], not an object"),
        (3, "holds 3, not an object"),
        (changed("colour", to=3), "colour"),
        (changed("model", to=1), "cannot be read as a run's config"),
        (changed("model", "width", to="16"), "model.width is '16'"),
        (changed("model", "width", to=16.0), "model.width is 16.0"),
        (changed("model", "tied", to="no"), "model.tied is 'no'"),
        (changed("optim", to=None), "cannot be read as a run's config"),
        (changed("optim", "b1", to=[0.9]), "optim.b1 is"),
        (changed("optimizer", to="sofia"), "KeyError: 'sofia'"),
        (changed("optimizer", to=["adamw"]), "TypeError"),
        (changed("base", to="big"), "KeyError: 'big'"),
        (changed("steps", to=True), "steps is True"),
        (changed("seed", to=None), "seed is None"),
        (changed("warmup_steps", to="few"), "warmup_steps is 'few'"),
        (changed("precision", to="float8"), "precision is 'float8'"),
        (changed("output", "quiet", to=0), "output.quiet is 0"),
        (changed("output", "folder", to=7), "output.folder is 7"),
        (changed("data", "task", to={"a": 1}), "data.task is"),
    ],
)
def test_a_config_of_another_form_is_named(tmp_path, fields, words):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json .*{words}"):
        serialize.load(tmp_path)


def test_the_default_warm_up_is_a_share_of_the_steps():
    """A preset's own at its own number of steps; then a tenth of fewer, and no more for longer."""
    for model, steps, want in [
        ("tiny", 1200, 100),
        ("tiny", 60, 6),
        ("tiny", 5, 0),
        ("tiny", 10**6, 100),
        ("gpt2-125m", 100_000, 2000),
        ("gpt2-125m", 4000, 400),
    ]:
        run = dataclasses.replace(preset(model, "adamw"), steps=steps)
        assert run.warmup == want
        assert float(run.schedule(want)) == pytest.approx(run.optim.learning_rate)
        assert serialize.from_json(json.loads(json.dumps(serialize.to_json(run)))) == run
    given = dataclasses.replace(preset(), warmup_steps=100)
    assert given.hash == preset().hash  # it is the same run


@pytest.mark.parametrize("model", PRESETS)
def test_every_model_has_a_preset_of_every_optimizer_under_its_name(model):
    assert [name_of(preset(model, name).optim) for name in OPTIMIZERS] == list(OPTIMIZERS)


DECAYING = [name for name in OPTIMIZERS if hasattr(preset("tiny", name).optim, "weight_decay")]
ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
PARAMS = {"matrix": jnp.full((4, 6), 0.1), "vector": jnp.full(6, 0.2)}


def logits_fn(params, rows):
    return rows @ params["matrix"] + params["vector"]


def obj_fn(params, rows):
    return jnp.mean(jnp.cosh(logits_fn(params, rows)) ** 2)


def gradient(random):
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), PARAMS)


def updates_of(optim, *, steps=3, rate=0.5, total_steps=8, by_host=True):
    made = optim.make(lambda _: rate, seed=0, total_steps=total_steps, batch_size=len(ROWS))
    return follow(made, optim, steps, by_host)


def follow(tx, optim, steps=3, by_host=True):
    """The leaves of each update and of the last state, along a fixed path of gradients."""
    tx, random, updates = optax.with_extra_args_support(tx), np.random.default_rng(1), []
    state = tx.init(PARAMS)
    for step in range(steps):
        grads, extra = gradient(random), {"value": 2 - step / 9}
        if hasattr(optim, "estimator"):
            extra["hessian"] = jax.tree.map(jnp.square, gradient(random))
        if by_host:
            extra["refresh"] = refresh_due(optim, step)
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
    "sophia-g": {"gamma": 20.0, "update_interval": 6},  # a spread sample needs 6 rows then
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
        estimate = functools.partial(optim.estimator(1), updates=None, **extra)
        leaves = jax.tree.leaves(jax.jit(estimate)(jax.random.key(0), PARAMS))
        return np.concatenate([np.ravel(x) for x in leaves])

    before = sample(kind())
    for field in dataclasses.fields(kind):
        if field.name in SAMPLING | {"spread"}:
            change = {field.name: another(field, getattr(kind(), field.name))}
            gap = np.abs(sample(kind(**change)) - before).max()
            assert gap > 1e-3 * np.abs(before).max(), change  # more than programs round apart


@pytest.mark.parametrize("optimizer", DECAYING)
def test_weight_decay_is_times_the_learning_rate_and_moves_matrices_only(optimizer):
    optim = dataclasses.replace(preset("tiny", optimizer).optim, weight_decay=0.5)
    made = optim.make(lambda _: 0.25, seed=0, total_steps=10, batch_size=len(ROWS))
    tx = optax.with_extra_args_support(made)
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
        assert {refresh_due(optim, step) for step in range(7)} == {None}
        return
    for interval, flags in {1: [None] * 4, 3: [True, False, False, True]}.items():
        chosen = dataclasses.replace(optim, update_interval=interval)
        assert [refresh_due(chosen, step) for step in range(4)] == flags


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h", "sophia-lite", "sophia-geometric"])
def test_state_dtypes_reach_every_moment(optimizer):
    flags = {"mu_dtype": "bfloat16", "hessian_dtype": "bfloat16"}
    optim = dataclasses.replace(preset("tiny", optimizer).optim, **flags)
    state = optim.make(lambda _: 1.0, seed=0, total_steps=10, batch_size=len(ROWS)).init(PARAMS)
    moments = [x.dtype for x in jax.tree.leaves(state) if x.shape == PARAMS["matrix"].shape]
    assert moments == [jnp.bfloat16] * 2


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h", "sophia-lite", "sophia-geometric"])
def test_the_seed_decides_what_is_random(optimizer):
    optim = dataclasses.replace(preset("tiny", optimizer).optim, hessian_dtype="bfloat16")
    extra = {"obj_fn": obj_fn, "logits_fn": logits_fn, "inputs": ROWS}

    def state(seed):
        tx = optim.make(lambda _: 1.0, seed=seed, total_steps=10, batch_size=len(ROWS))
        return jax.tree.leaves(tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra)[1])

    assert not same(state(0), state(1))


def test_the_radius_of_soaa_closes_in_over_the_steps_of_the_run():
    optim = preset("tiny", "soaa").optim
    fields = dataclasses.asdict(optim)
    fields |= {"learning_rate": lambda _: 0.5, "weight_decay_mask": matrices}
    runs = {total: updates_of(optim, total_steps=total) for total in (8, 80)}
    assert not same(*runs.values())
    for total, run in runs.items():
        assert same(run, follow(sophia_optax.soaa(**fields, total_steps=total), optim))


@pytest.mark.parametrize(
    ("groups", "devices", "shards"),
    [(1, 8, 1), (2, 2, 2), (3, 2, 1), (3, 8, 1), (0, 3, 6), (0, 8, 8), (2, 8, 1)],
)
def test_the_estimator_of_sophia_g_is_the_same_on_any_number_of_devices(groups, devices, shards):
    """Side by side go groups that devices divide, and single rows; no groups are one a row."""
    optim = SophiaG(groups=groups, batch_fraction=1.0, num_samples=2)
    assert optim.shards(devices, 6) == shards
    direct = sophia_optax.gauss_newton_bartlett(groups=groups or 6, num_samples=2)
    samples = [
        estimator(jax.random.key(3), PARAMS, None, logits_fn=logits_fn, inputs=ROWS)
        for estimator in (optim.estimator(shards, 6), direct)
    ]
    assert_close(*samples, rtol=1e-6)


def test_above_eight_groups_a_device_they_go_in_rounds():
    assert SophiaG(groups=0).shards(2, 16) == 16
    assert SophiaG(groups=0).shards(2, 18) == 2
    assert SophiaG(groups=0).shards(4, 34) == 4


@pytest.mark.parametrize(
    ("optim", "change", "message"),
    [
        ({}, {"accumulation": 0}, "accumulation=0 must be at least 1"),
        ({}, {"accumulation": 3}, "batch_size=16 does not divide into accumulation=3"),
        ({"batch_fraction": 1 / 3}, {}, "every 3-th row, which does not divide batch_size=16"),
        ({"spread": True}, {}, "spread over 10 steps takes every 10-th row, .* or --optim.update"),
        ({"batch_fraction": 0.0}, {}, r"batch_fraction=0.0 is outside \(0, 1\]"),
        ({"batch_fraction": 0.25}, {"batch_size": 24, "accumulation": 6}, "one must divide the ot"),
        ({"groups": 3}, {}, "16 rows, sampled of each of 1 micro-batches, do not divide into 3"),
        ({"groups": 16, "batch_fraction": 0.5}, {}, "8 rows, sampled .* lower --optim.groups"),
    ],
)
def test_rows_that_cannot_be_cut_are_refused_where_the_run_is_described(optim, change, message):
    run = preset()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(run, optim=dataclasses.replace(run.optim, **optim), **change)


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


def test_the_reference_of_a_run_in_micro_batches_is_that_in_one_piece():
    cut = dataclasses.replace(preset("tiny", "sophia-g"), accumulation=2)
    assert baseline.twin(cut) == preset("tiny", "adamw")
