"""The examples of docs/conventions.md run and reproduce the implementations that they name."""

import doctest
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles as o
import pytest
from exact import ExactLinear
from places import ROOT

from sophia_optax import gauss_newton_bartlett, hessian_estimate, hutchinson
from sophia_optax.estimators.likelihood import sample_categorical

PAGE = ROOT / "docs" / "conventions.md"
STEPS, K = 32, 3
MODEL = ExactLinear("categorical", np.random.default_rng(0).normal(size=(6, 4)))
LABELS = np.random.default_rng(1).integers(3, size=6)
W = {"W": np.random.default_rng(2).normal(size=(4, 3))}


@pytest.fixture(scope="module")
def page():
    """The names that the page defines, after its examples printed what they should."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    test = doctest.DocTestParser().get_doctest("".join(blocks), names, PAGE.name, None, 0)
    report = []
    failures = doctest.DocTestRunner(verbose=False).run(test, out=report.append, clear_globs=False)
    assert failures.attempted > 10 and failures.failed == 0, "".join(report)
    return test.globs


def logits_fn(params):
    return MODEL.X @ params["W"]


def obj_fn(params):
    return optax.softmax_cross_entropy_with_integer_labels(logits_fn(params), LABELS).mean()


def gradient(n, params):
    return jax.grad(obj_fn)(params)


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours["W"], theirs["W"], rtol=1e-6, atol=1e-6)


def optax_path(tx):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(0, params), state, params, obj_fn=obj_fn)
        return (optax.apply_updates(params, updates), state), None

    start = single(W)
    return jax.lax.scan(step, (start, tx.init(start)), length=STEPS)[0]


ARGUMENTS = {"b1": 0.9, "b2": 0.8, "gamma": 0.5, "weight_decay": 0.1}


@pytest.mark.parametrize("clip_threshold", [1.0, 0.3])
def test_the_page_follows_optax_with_its_own_probes(page, clip_threshold):
    arguments = ARGUMENTS | {"clip_threshold": clip_threshold}
    theirs, _ = optax_path(optax.contrib.sophia(0.05, **arguments, update_interval=K))
    keys = [jax.random.key(0)]

    def probe(n, params):
        keys[0], key = jax.random.split(keys[0])
        return hutchinson()(key, params, None, obj_fn=obj_fn)

    tx = page["optax_sophia"](0.05, **arguments)
    due = lambda n: n % K == 0  # noqa: E731
    ours = page["sample_afterwards"](tx, single(W), STEPS, gradient, probe, due)
    assert_same(ours, theirs)


def test_our_estimate_serves_as_the_hessian_diagonal_fn_of_optax():
    own = optax.contrib.sophia(0.05, update_interval=K)  # splits key(0), call by call
    keys, key = [], jax.random.key(0)
    for _ in range(STEPS):
        key, probe = jax.random.split(key)
        keys.append(probe)
    keys = jnp.stack(keys)

    def same_probes(key, params, updates, *, count, **extra):
        return hutchinson()(keys[count], params, updates, **extra)

    estimate = hessian_estimate(same_probes, decay=0, update_interval=1, bias_correction=False)

    def update(updates, state, params=None, **extra):
        return estimate.update(updates, state, params, count=state.count, **extra)

    ours = optax.contrib.sophia(
        0.05,
        update_interval=K,
        hessian_diagonal_fn=optax.GradientTransformationExtraArgs(estimate.init, update),
    )
    (_, theirs), (_, state) = optax_path(own), optax_path(ours)
    np.testing.assert_allclose(state[0].nu["W"], theirs[0].nu["W"], rtol=1e-6)


def test_the_page_follows_a_derivation_of_levanter(page):
    """Corrected m, raw h; h absorbs a normal probe after updates k-1, 2k-1, ..."""
    b1, b2, gamma, eps, lr, decay = 0.9, 0.8, 0.5, 1e-8, 0.05, 0.1
    key = lambda n: jax.random.fold_in(jax.random.key(3), n)  # noqa: E731

    def probe(n, params):
        return hutchinson(probe="normal")(key(n), params, None, obj_fn=obj_fn)

    p, m, h = W["W"], np.zeros((4, 3)), np.zeros((4, 3))
    for n in range(STEPS):
        m = b1 * m + (1 - b1) * MODEL.gradient({"W": p}, LABELS)["W"]
        ratio = m / (1 - b1 ** (n + 1)) / np.maximum(gamma * h, eps)
        if (n + 1) % K == 0:
            u = optax.tree.random_like(key(n), single(W), jax.random.normal)["W"]
            u = np.asarray(u, np.float64)
            sample = u * (MODEL.hessian({"W": p}) @ u.ravel()).reshape(u.shape)
            h = b2 * h + (1 - b2) * sample
        p = p - lr * (np.clip(ratio, -1, 1) + decay * p)

    tx = page["levanter_sophia_h"](lr, b1=b1, b2=b2, gamma=gamma, weight_decay=decay)
    due = lambda n: (n + 1) % K == 0  # noqa: E731
    ours = page["sample_afterwards"](tx, single(W), STEPS, gradient, probe, due)
    assert_same(ours, {"W": p})


@pytest.mark.parametrize("given", [True, False], ids=["hessian=", "logits_fn="])
def test_the_page_follows_the_released_sophia_g(page, given):
    """The oracle averages ĝ² and multiplies by ρB; ours averages Bĝ² and multiplies by ρ."""
    B, arguments = 6, {"b1": 0.9, "b2": 0.8, "rho": 0.5, "weight_decay": 0.2}
    tx = page["released_sophia_g"](0.05, **arguments)
    oracle, theirs = o.ReleasedSophiaG(0.05, B=B, update_interval=K, **arguments), W
    update = jax.jit(tx.update, static_argnames=("refresh", "logits_fn"))
    ours, state = single(W), tx.init(single(W))
    for n in range(STEPS):
        key, due = jax.random.fold_in(jax.random.key(0), n), n > 0 and n % K == 0
        assert due == oracle.refresh_due
        extra = {} if given else {"logits_fn": logits_fn}
        if due:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
            labels = jax.vmap(sample_categorical)(keys, logits_fn(ours))
            oracle.refresh(o.squared_gradient(MODEL.gradient(theirs, np.asarray(labels))))
            g = MODEL.gradient(theirs, np.asarray(labels))
            extra = {"hessian": single(o.squared_gradient(g, B))} if given else extra
        theirs = oracle.step(theirs, MODEL.gradient(theirs, LABELS))
        updates, state = update(gradient(n, ours), state, ours, refresh=due, **extra)
        ours = optax.apply_updates(ours, updates)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("paper_sophia_h", hutchinson(probe="normal")),
        ("paper_sophia_g", gauss_newton_bartlett()),
    ],
)
def test_the_page_follows_the_paper(page, name, estimator):
    arguments = ARGUMENTS | {"eps": 1e-3, "update_interval": K}
    tx, oracle, theirs = page[name](0.05, **arguments), o.Sophia(0.05, **arguments), W
    ours, state = single(W), tx.init(single(W))
    extra = {"obj_fn": obj_fn, "logits_fn": logits_fn}
    update = jax.jit(functools.partial(tx.update, **extra))
    for n in range(K + 2):
        sample = None
        if n % K == 0:
            key = jax.random.fold_in(jax.random.key(0), n)
            sample = jax.tree.map(np.asarray, estimator(key, ours, None, **extra))
        updates, state = update(gradient(n, ours), state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs = oracle.step(theirs, MODEL.gradient(theirs, LABELS), sample)
    assert_same(ours, theirs)
