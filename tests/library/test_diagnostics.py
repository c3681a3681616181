"""diagnostics: a flat dict of scalars from an optimizer state of any nesting."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sophia_optax import (
    clip_by_ratio,
    diagnostics,
    floor,
    hessian_estimate,
    rms_floor,
    second_moment,
    soaa,
    sophia_h,
    trust_region,
)

CLIPPING = {"clipped_fraction", "win_rate", "floored_fraction", "momentum_nonfinite_leaves"}
CURVATURE = {
    "hessian_age",
    "hessian_accepted",
    "hessian_rejected",
    "hessian_zero_samples",
    "hessian_zero_leaves",
}
REGION = {"trust_radius", "predicted_reduction"}
PARAMS = {"w": jnp.zeros(4), "v": jnp.zeros((2, 3))}
GRADS = {"w": jnp.array([2.0, 2.0, 0.1, 2.0]), "v": jnp.full((2, 3), 0.1)}
SAMPLE = {"w": jnp.array([1.0, 1.0, 1.0, -1.0]), "v": jnp.ones((2, 3))}
ARGUMENTS = {"learning_rate": 0.1, "b1": 0.0, "gamma": 1.0}

WRAPPERS = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx, optax.scale(2.0)),
    "named_chain": lambda tx: optax.named_chain(("ours", tx), ("scale", optax.scale(2.0))),
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


def partitioned(x, y):
    return optax.partition({"x": x, "y": y}, {"w": "x", "v": "y"}, mask_compatible_extra_args=True)


def assert_scalars(found, names):
    assert set(found) == set(names)
    for name, value in found.items():
        assert value.shape == () and value.dtype == np.float32, name


def assert_close(found, expected, rtol=1e-6):
    assert_scalars(found, expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol, atol=1e-30, err_msg=name)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", ["inject_hyperparams", *WRAPPERS])
def test_ten_coordinates_nine_live_two_clipped_in_every_wrapper(name):
    if name == "inject_hyperparams":
        static = ("estimator", "weight_decay_mask")
        tx = optax.inject_hyperparams(sophia_h, static_args=static)(**ARGUMENTS)
    else:
        tx = WRAPPERS[name](sophia_h(**ARGUMENTS))
    expected = {
        "clipped_fraction": 2 / 9,
        "win_rate": 7 / 9,
        "floored_fraction": 1 / 10,
        "hessian_age": 0,
        "hessian_accepted": 1,
        "hessian_rejected": 0,
        "hessian_zero_samples": 0,
        "hessian_zero_leaves": 0,
        "momentum_nonfinite_leaves": 0,
    }
    assert_close(diagnostics(state_after(tx)), expected)


def test_age_counts_updates_since_the_last_sample_and_rejections_are_counted():
    tx = sophia_h(**ARGUMENTS)
    state = state_after(tx)
    _, state = tx.update(GRADS, state, PARAMS, refresh=False)
    bad = jax.tree.map(lambda x: x * jnp.nan, SAMPLE)
    _, state = tx.update(GRADS, state, PARAMS, hessian=bad)
    found = diagnostics(state)
    assert (found["hessian_age"], found["hessian_rejected"], found["hessian_accepted"]) == (2, 1, 1)


@pytest.mark.parametrize("name", WRAPPERS)
def test_radius_and_predicted_reduction_by_hand_in_every_wrapper(name):
    tx = WRAPPERS[name](trust_region(optax.identity(), 0.1, total_steps=100))
    state = tx.init(PARAMS)
    for value in (3.0, 0.25):
        _, state = tx.update(GRADS, state, PARAMS, value=value)
    predicted = 0.1 * (3 * 2.0**2 + 7 * 0.1**2)  # lr Σ g u with u = g: the radius was 1
    radius = ((0.9 * 0.1 * 3 + 0.1 * 0.25) / 0.19 - 0.25) / predicted
    assert 0.75 ** (1 / 100) < radius < 1 + 0.25 ** (1 / 100)  # else the bounds would decide
    assert_close(diagnostics(state), {"trust_radius": radius, "predicted_reduction": predicted})


@pytest.mark.parametrize("off", [{"statistics": False}, {"clip_threshold": None}])
def test_without_statistics_the_curvature_is_still_described(off):
    assert_scalars(diagnostics(state_after(sophia_h(**ARGUMENTS, **off))), CURVATURE)


def test_a_hessian_estimate_alone_is_described():
    tx = optax.chain(hessian_estimate(None), optax.scale(-1.0))
    assert_scalars(diagnostics(state_after(tx)), CURVATURE)


def test_a_custom_composition_is_described():
    tx = clip_by_ratio(
        optax.trace(0.9), hessian_estimate(None), denominator=floor(1.0), clip_threshold=1.0
    )
    assert_scalars(diagnostics(state_after(tx)), CLIPPING | CURVATURE)


@pytest.mark.parametrize(("rule", "names"), [("soaa", CURVATURE | REGION), ("tadam", REGION)])
def test_the_moment_is_the_curvature_of_soaa_alone(rule, names):
    """Tadam's curvature is the centred moment; Adam's moment beside it is not reported."""
    tx = soaa(0.1, 100, rule=rule)
    assert_scalars(diagnostics(state_after(tx, value=1.0)), names)


def test_a_second_moment_beside_the_curvature_is_not_taken_for_it():
    tx = clip_by_ratio(
        optax.ema(0.9, debias=True, accumulator_dtype=None),
        hessian_estimate(None, decay=0.0),
        second_moment=second_moment(0.9),
        denominator=rms_floor(),
    )
    state = state_after(tx)
    _, state = tx.update(GRADS, state, PARAMS, refresh=False)
    found = diagnostics(state, quantiles=1.0)
    assert_scalars(found, CLIPPING | CURVATURE | {"hessian_norm", "hessian_quantile_1"})
    assert (found["hessian_age"], found["hessian_accepted"]) == (1, 1)
    assert found["hessian_quantile_1"] == 1  # of the sample; of g² it would be 4


def test_optimizers_without_curvature_have_none():
    for tx in (optax.adamw(0.1), optax.contrib.sophia(0.1), optax.sgd(0.1)):
        assert diagnostics(tx.init(PARAMS), quantiles=()) == {}


def test_parameters_named_like_our_fields_are_not_confused():
    Params = collections.namedtuple("Params", ["clipped", "age"])
    params = {
        "clipped": jnp.ones(3),
        "age": {"h": jnp.ones(2), "HessianEstimateState": jnp.ones(1)},
        "accepted": Params(jnp.ones(2), jnp.ones(4)),
    }
    tx = sophia_h(**ARGUMENTS)
    _, state = tx.update(params, tx.init(params), params, hessian=params)
    found = diagnostics(state, quantiles=())
    assert_scalars(found, CLIPPING | CURVATURE | {"hessian_norm"})
    assert found["hessian_accepted"] == 1
    np.testing.assert_allclose(found["hessian_norm"], 12**0.5, rtol=1e-6)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("wrapper", ["plain", "chain", "masked", "MultiSteps", "apply_if_finite"])
def test_two_of_a_kind_are_told_apart_by_the_labels_of_their_partition(wrapper):
    tx = WRAPPERS[wrapper](partitioned(sophia_h(0.1), sophia_h(0.2)))
    names = CLIPPING | CURVATURE
    found = diagnostics(state_after(tx))
    assert_scalars(found, {f"{label}.{name}" for label in "xy" for name in names})


def test_a_lone_kind_leads_with_its_label_where_another_kind_must():
    """Scalars under one label are reported together; a region around both parts has no label."""
    both = partitioned(sophia_h(0.1), sophia_h(0.1, statistics=False))
    tx = trust_region(both, 0.1, total_steps=10)
    names = {f"x.{name}" for name in CLIPPING | CURVATURE} | {f"y.{name}" for name in CURVATURE}
    assert_scalars(diagnostics(state_after(tx, value=1.0)), names | REGION)


def test_labels_of_two_levels_are_joined():
    inner = partitioned(sophia_h(0.1), sophia_h(0.1))
    tx = optax.named_chain(("first", inner), ("second", sophia_h(0.1)))
    leads = {name.rpartition(".")[0] for name in diagnostics(state_after(tx))}
    assert leads == {"first.x", "first.y", "second"}


def test_two_without_labels_are_told_apart_by_their_path():
    tx = optax.chain(sophia_h(0.1), sophia_h(0.1))
    found = diagnostics(state_after(tx))
    assert len(found) == 2 * len(CLIPPING | CURVATURE)
    assert {"[0][0].win_rate", "[1][0].win_rate"} <= set(found)


# ---------------------------------------------------------------- norm and quantiles


def described(h, quantiles=(0.1, 0.5, 0.9), mass=1.0, describe=diagnostics):
    """Norm and quantiles of a state that holds h."""
    state = hessian_estimate(None).init({})._replace(h=h, mass=jnp.float32(mass))
    found = describe(state, quantiles)
    return {name.removeprefix("hessian_"): x for name, x in found.items() if name not in CURVATURE}


def exact(h, quantiles=(0.1, 0.5, 0.9), mass=1.0):
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(h)]).astype(np.float64) / mass
    norm = {"norm": np.sqrt(np.sum(flat**2))}
    return norm | {f"quantile_{q}": np.quantile(flat, q) for q in quantiles}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_norm_and_quantiles_are_those_of_the_corrected_average(debias, dtype):
    samples = [{"w": normal(i, 4), "v": normal(i + 2, 2, 3)} for i in (0, 10)]
    tx = hessian_estimate(None, decay=0.75, bias_correction=debias, dtype=dtype)
    state = tx.init(PARAMS)
    for sample in samples:
        _, state = tx.update(GRADS, state, hessian=sample)
    h = jax.tree.map(lambda a, b: (0.75 * 0.25 * a + 0.25 * b) / (1 - 0.75**2), *samples)
    expected = {f"hessian_{name}": x for name, x in exact(h).items()}
    found = diagnostics(state, quantiles=(0.1, 0.5, 0.9))
    found = {name: x for name, x in found.items() if name not in CURVATURE}
    assert_scalars(found, expected)
    # A place between two order statistics is a float32 too; two roundings of h to bfloat16.
    error = 2e-6 if dtype is None else 4 * jnp.finfo(dtype).eps
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, error, error, err_msg=name)


def test_curvature_without_samples_and_without_coordinates_is_zero():
    zero = {"norm": 0, "quantile_0.5": 0}
    assert_close(described(PARAMS, 0.5, mass=0.0), zero)
    assert_close(described({}, 0.5), zero)
    assert_close(described({"empty": jnp.zeros((0, 3))}, 0.5), zero)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norm_neither_under_nor_overflows_where_h_does_not(scale):
    h = {"a": normal(0, 30) * np.float32(scale)}
    assert_close(described(h), exact(h), rtol=1e-5)


def test_curvature_beyond_float32_reads_infinite():
    with jax.enable_x64(True):
        assert np.isinf(described({"a": jnp.array([1e300, 1.0])}, ())["norm"])


@pytest.mark.parametrize("shapes", [[(2**17, 8)], [(400, 768), (768,), (), (12, 256, 77)]])
def test_quantiles_are_exact_or_within_the_standard_error_of_65536_draws(shapes):
    """Coordinates repeat along rows, so a stride that divides the row length would miss some."""
    rng = np.random.default_rng(0)
    rows = [rng.normal() + np.sort(rng.normal(size=shape[-1:] or 1)) for shape in shapes]
    h = [
        np.broadcast_to(x, shape or 1).astype(np.float32)
        for x, shape in zip(rows, shapes, strict=True)
    ]
    flat, found = np.sort(np.concatenate([x.ravel() for x in h])), described(h)
    for q in (0.1, 0.5, 0.9):
        value = float(found[f"quantile_{q}"])
        low, high = (np.searchsorted(flat, value, side) / flat.size for side in ("left", "right"))
        error = max(low - q, q - high, 0)
        assert error <= 4 * (q * (1 - q) / 2**16) ** 0.5


def test_every_leaf_of_a_large_tree_has_its_share_of_the_sample():
    h = {"a": np.zeros((300, 1000)), "b": np.ones(699_000), "c": np.full(1000, 2.0)}
    found = described(h, (0.299, 0.301, 0.998, 0.9995))
    assert [float(x) for name, x in found.items() if name != "norm"] == [0, 1, 1, 2]


def test_many_small_leaves_of_a_large_tree_weigh_no_more_than_their_size():
    scalars = {str(i): np.float32(0) for i in range(60)}  # one each would be a rank of .001
    h = {**scalars, "matrix": np.ones((60, 100_000), np.float32)}
    assert described(h, 0.0005)["quantile_0.0005"] == 1


def test_without_quantiles_nothing_but_scalars_is_read():
    state = sophia_h(0.1).init({"w": jnp.zeros((1000, 100))})

    def bytes_read(*arguments):
        program = jax.jit(lambda state: diagnostics(state, *arguments)).lower(state).compile()
        return program.cost_analysis()["bytes accessed"]

    assert bytes_read() < 1000 < 4e5 < bytes_read(())


@pytest.mark.parametrize("bad", [-0.1, 1.5, (0.5, float("nan"))])
def test_a_quantile_outside_the_unit_interval_is_refused(bad):
    with pytest.raises(ValueError, match=r"quantiles=\S+ is outside \[0, 1\]"):
        diagnostics((), quantiles=bad)


# ---------------------------------------------------------------- where the state lies


def test_a_state_fetched_to_the_host_reads_the_same():
    state = state_after(sophia_h(**ARGUMENTS, hessian_dtype="bfloat16"))
    found = diagnostics(jax.device_get(state), quantiles=0.5)
    assert_scalars(found, CLIPPING | CURVATURE | {"hessian_norm", "hessian_quantile_0.5"})
    assert found == diagnostics(state, quantiles=0.5)


def test_it_runs_inside_jit_under_strict_promotion():
    state = state_after(partitioned(sophia_h(0.1, hessian_dtype="bfloat16"), soaa(0.1, 9)))
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(lambda state: diagnostics(state, (0.5,)))(state)
    expected = {name: float(x) for name, x in diagnostics(state, (0.5,)).items()}
    assert "y.trust_radius" in expected and "x.hessian_quantile_0.5" in expected
    assert_close(found, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_reads_the_same_and_gathers_nothing_but_the_sample(kind):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(kind,) * 2)
    specs = [("fsdp",), (None, "fsdp"), ("data", "fsdp"), (("data", "fsdp"),), ()]
    h = {str(i): normal(i, 128, 256).astype(jnp.bfloat16) for i in range(5)}
    sharded = {
        name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        for (name, x), spec in zip(h.items(), specs, strict=True)
    }
    assert_close(described(sharded), {n: float(x) for n, x in described(h).items()}, rtol=1e-5)

    def compiled(h):
        return jax.jit(lambda h: described(h)).lower(h).compile().as_text()

    assert "all-reduce" in compiled(sharded)
    assert not re.search("all-gather|all-to-all|collective-permute", compiled(sharded))
