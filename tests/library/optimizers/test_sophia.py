"""sophia_h and sophia_g are algorithm 3, step by step, against a NumPy float64 oracle."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles as o
import paths
import pytest
from exact import ExactLinear
from paths import (
    GRADS,
    MASK,
    PARAMS,
    REJECTED,
    SAMPLES,
    SHAPES,
    STEPS,
    assert_equal_paths,
    cast,
    given_sample,
    oracle_arguments,
    row,
    schedule,
)

from sophia_optax import gauss_newton_bartlett, hutchinson, sophia_g, sophia_h
from sophia_optax.estimators.likelihood import sample_categorical

FACTORIES = {"sophia_h": sophia_h, "sophia_g": sophia_g}
LETTER = {"debias_momentum": False, "debias_hessian": False, "weight_decay": 0.0}
LETTER |= {"b1": 0.9, "b2": 0.8, "gamma": 0.5, "eps": 0.05, "update_interval": 3}


CASES = {
    "the letter of the paper": {},
    "k = 1": {"update_interval": 1},
    "k = 10": {"update_interval": 10},
    "momentum corrected": {"debias_momentum": True},
    "h corrected": {"debias_hessian": True, "update_interval": 10},
    "both corrected": {"debias_momentum": True, "debias_hessian": True},
    "no clip": {"clip_threshold": None},
    "clip at .3": {"clip_threshold": 0.3},
    "sign steps below eps": {"eps": 1e-12, "b1": 0.0},
    "weight decay": {"weight_decay": 0.3},
    "masked weight decay": MASK,
    "mask by function": MASK
    | {"weight_decay_mask": lambda p: jax.tree.map(lambda x: x.ndim == 2, p)},
    "weight decay schedule": {"weight_decay": schedule},
    "learning rate schedule": {"learning_rate": schedule, "weight_decay": 0.3},
}


def ours(factory, arguments, samples, dtype, refresh=None):
    tx = factory(**arguments, estimator=given_sample)
    return paths.ours(tx, dtype, sample=samples, refresh=refresh)


def theirs(arguments, samples, refresh=None):
    oracle = o.Sophia(**oracle_arguments(arguments))
    return paths.theirs(oracle, hessian=samples, refresh=refresh), oracle


@pytest.mark.parametrize(
    ("factory", "dtype"),
    [("sophia_h", "float32"), ("sophia_h", "float64"), ("sophia_g", "float64")],
)
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_algorithm_3(case, factory, dtype):
    arguments = {"learning_rate": 0.1} | LETTER | CASES[case]
    expected, oracle = theirs(arguments, SAMPLES)
    assert any((h < 0).any() for h in oracle.h.values())
    with jax.enable_x64(dtype == "float64"):
        path, state = ours(FACTORIES[factory], arguments, SAMPLES, dtype)
        assert_equal_paths(path, expected, dtype)
        np.testing.assert_allclose(state[0].curvature.mass, oracle.mass, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("debias", [False, True])
def test_rejected_samples_leave_the_path_of_algorithm_3_without_them(debias, dtype):
    arguments = {"learning_rate": 0.1} | LETTER | {"debias_hessian": debias}
    expected, oracle = theirs(arguments, REJECTED)
    with jax.enable_x64(dtype == "float64"):
        path, state = ours(sophia_h, arguments, REJECTED, dtype)
        assert_equal_paths(path, expected, dtype)
    assert (state[0].curvature.rejected, state[0].curvature.accepted) == (3, 8)
    assert oracle.rejected == 3


IRREGULAR = np.isin(np.arange(STEPS), (2, 3, 7, 15, 30))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_traced_refreshes_follow_the_host(dtype):
    arguments = {"learning_rate": 0.1} | LETTER | {"debias_momentum": True, "debias_hessian": True}
    expected, _ = theirs(arguments, REJECTED, IRREGULAR)
    with jax.enable_x64(dtype == "float64"):
        path, _ = ours(sophia_h, arguments, REJECTED, dtype, IRREGULAR)
        assert_equal_paths(path, expected, dtype)


@pytest.mark.parametrize("boolean", [bool, np.bool_])
def test_static_refreshes_with_a_given_sample_follow_the_host(boolean):
    arguments = {"learning_rate": 0.1} | LETTER | {"debias_hessian": True}
    expected, _ = theirs(arguments, REJECTED, IRREGULAR)
    tx, params = sophia_h(**arguments), cast(PARAMS, "float32")

    def make(refresh):
        @jax.jit
        def step(params, state, grads, sample):
            extra = {"hessian": sample} if refresh else {}
            updates, state = tx.update(grads, state, params, refresh=boolean(refresh), **extra)
            return optax.apply_updates(params, updates), state

        return step

    programs, state, path = {due: make(due) for due in (False, True)}, tx.init(params), []
    for t, due in enumerate(IRREGULAR):
        xs = cast((row(GRADS, t), row(REJECTED, t)), "float32")
        params, state = programs[due](params, state, *xs)
        path.append(params)
    path = jax.tree.map(lambda *leaves: jnp.stack(leaves), *path)
    assert_equal_paths(path, expected, "float32")


# ---------------------------------------------------------------- the estimators' own samples

ROWS, V = 6, 3
X = np.random.default_rng(3).normal(size=(ROWS, 4))
LABELS = np.random.default_rng(4).integers(V, size=ROWS)
W = {"W": np.random.default_rng(5).normal(size=(4, V))}
MODEL = ExactLinear("categorical", X)


def logits_fn(params, inputs=X):
    return inputs @ params["W"]


def obj_fn(params):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_fn(params), LABELS)
    return losses.mean()


def probe_sample(seed):
    def sample(params, count):
        key = jax.random.fold_in(jax.random.key(seed), count)
        u = np.asarray(optax.tree.random_like(key, cast(params, float), jax.random.rademacher)["W"])
        return o.hutchinson({"W": u}, {"W": (MODEL.hessian(params) @ u.ravel()).reshape(u.shape)})

    return sample


def label_sample(seed, groups):
    def sample(params, count):
        key = jax.random.fold_in(jax.random.key(seed), count)
        keys = [jax.random.fold_in(key, i) for i in range(ROWS)]
        f = jnp.asarray(MODEL.outputs(params))
        labels = np.array([sample_categorical(k, f[i]) for i, k in enumerate(keys)])
        cuts = np.split(np.arange(ROWS), groups)
        models = [ExactLinear("categorical", X[cut]) for cut in cuts]
        sums = [m.summed_sample(params, labels[c]) for m, c in zip(models, cuts, strict=True)]
        return o.grouped_gnb(sums, ROWS)

    return sample


@pytest.mark.parametrize(
    ("factory", "estimator", "extra", "sample"),
    [
        (sophia_h, None, {"obj_fn": obj_fn}, probe_sample),
        (sophia_h, hutchinson(mode="reverse"), {"obj_fn": obj_fn}, probe_sample),
        (sophia_g, None, {"logits_fn": logits_fn}, lambda seed: label_sample(seed, 1)),
        (
            sophia_g,
            gauss_newton_bartlett(groups=3),
            {"logits_fn": logits_fn, "inputs": X},
            lambda seed: label_sample(seed, 3),
        ),
    ],
    ids=["probes", "probes, reverse", "labels", "labels of three groups"],
)
def test_counter_driven_samples_are_those_of_seed_and_count(factory, estimator, extra, sample):
    arguments = {
        "learning_rate": 0.05,
        "b1": 0.9,
        "b2": 0.8,
        "gamma": 0.5,
        "eps": 1e-3,
        "weight_decay": 0.1,
    }
    arguments |= {"update_interval": 4, "debias_momentum": True, "debias_hessian": True}
    with jax.enable_x64(True):
        tx = factory(**arguments, seed=7, estimator=estimator)
        sample, oracle, expected, path = sample(7), o.Sophia(**arguments), W, []
        for t in range(30):
            hessian = sample(expected, t) if t % 4 == 0 else None
            expected = oracle.step(expected, MODEL.gradient(expected, LABELS), hessian)
            path.append(expected["W"])

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(obj_fn)(params), state, params, **extra)
            params = optax.apply_updates(params, updates)
            return (params, state), params["W"]

        params = cast(W, float)
        (_, state), ours = jax.lax.scan(step, (params, tx.init(params)), length=30)
        np.testing.assert_allclose(ours, path, rtol=1e-10)
        np.testing.assert_allclose(state[0].curvature.h["W"], oracle.h["W"], rtol=1e-10)
        assert state[0].curvature.accepted == 8


def of_axis(key, params, updates, *, axis_name, **unused):
    """An estimator whose sample shows which axis name it received."""
    return jax.tree.map(lambda g: g * len(axis_name or ""), updates)


def test_the_aliases_are_one_program_but_for_estimator_and_gamma():
    h, g = (inspect.signature(f).parameters for f in (sophia_h, sophia_g))
    assert list(h) == list(g)
    assert {n for n in h if h[n].default != g[n].default} == {"gamma"}
    arguments = LETTER | {"clip_threshold": 0.3, "weight_decay": 0.2, "seed": 5}
    arguments |= {"mu_dtype": "bfloat16", "hessian_dtype": "bfloat16", "statistics": False}
    arguments |= {"weight_decay_mask": {n: n == "matrix" for n in SHAPES}}
    arguments |= {"learning_rate": 0.1, "estimator": of_axis, "axis_name": "data"}
    assert set(arguments) == set(h) and all(arguments[n] != h[n].default for n in h)
    params, programs = cast(PARAMS, "float32"), []
    for factory in (sophia_h, sophia_g):
        tx = factory(**arguments)
        programs.append(str(jax.make_jaxpr(lambda p, tx=tx: tx.update(p, tx.init(p), p))(params)))
    assert programs[0] == programs[1]


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_axis_name_reaches_the_estimator(factory):
    tx, params = FACTORIES[factory](0.1, estimator=of_axis, axis_name="data"), {"x": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), params, refresh=True)
    np.testing.assert_allclose(state[0].curvature.h["x"] / state[0].curvature.mass, 4.0)


def test_arguments_and_defaults_are_those_of_optax_but_for_eps():
    """The paper's eps is 1e-12; optax's 1e-8 cuts off more of the curvature."""
    mine = inspect.signature(sophia_h).parameters
    optax_ = dict(inspect.signature(optax.contrib.sophia).parameters)
    for name in ("hessian_diagonal_fn", "verbose", "print_win_rate_every_n_steps"):
        del optax_[name]
    assert list(mine)[: len(optax_)] == list(optax_)
    assert {n for n in optax_ if mine[n].default != optax_[n].default} == {"eps"}


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1.0}, r"b1=1.0 is outside \[0, 1\)"),
        ({"b2": -0.1}, r"b2=-0.1 is outside \[0, 1\)"),
        ({"gamma": -1.0}, "gamma=-1.0 is outside"),
        ({"eps": -1e-8}, "eps=-1e-08 is outside"),
        ({"clip_threshold": 0.0}, "None turns clipping off"),
        ({"update_interval": 0}, "update_interval=0 must be an integer of at least 1"),
    ],
)
def test_arguments_out_of_range_are_named(factory, arguments, message):
    with pytest.raises(ValueError, match=message):
        FACTORIES[factory](0.1, **arguments)
