"""Estimators that read only the gradient, against their formula in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles as o
import pytest
from paths import GRADS, cast, row

from sophia_optax import (
    gradient_magnitude,
    hessian_estimate,
    squared_gradient,
    weighted_squared_gradient,
)

KEY = jax.random.key(0)
G = row(GRADS, 0)
ESTIMATORS = {
    "squared": (squared_gradient(), o.squared_gradient),
    "squared, scaled": (squared_gradient(scale=24.0), lambda g: o.squared_gradient(g, 24.0)),
    "magnitude": (gradient_magnitude(), o.gradient_magnitude),
    "weighted": (weighted_squared_gradient(), o.weighted_squared_gradient),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def sampled(name, g, **extra):
    return ESTIMATORS[name][0](KEY, None, g, **extra)


def assert_formula(name, h, g, dtype, leaves=tuple(G), rtol=1e-6):
    exact = ESTIMATORS[name][1](jax.tree.map(lambda x: np.asarray(x, np.float64), g))
    for n in leaves:
        assert h[n].dtype == dtype
        np.testing.assert_allclose(h[n], exact[n], rtol=rtol)


@every_estimator
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_samples_are_the_formula_in_float32_of_what_the_gradient_holds(dtype, scale, name):
    """In float16, 300² overflows and 1e-3² loses most of its bits."""
    g = cast(jax.tree.map(lambda x: scale * x, G), dtype) | {"scalar": jnp.asarray(scale, dtype)}
    assert_formula(name, sampled(name, g), g, "float32")


@every_estimator
def test_samples_of_float64_gradients_keep_their_precision(name):
    with jax.enable_x64(True):
        g = cast(G, "float64")
        assert_formula(name, sampled(name, g), g, "float64", rtol=1e-14)


@every_estimator
@pytest.mark.parametrize("middle", ["float32", "float64"])
def test_leaves_of_several_dtypes_meet_in_one_norm(name, middle):
    """Also under strict promotion, except with float64, which optax's norm does not take."""
    strict = "strict" if middle == "float32" else "standard"
    with jax.enable_x64(True), jax.numpy_dtype_promotion(strict):
        dtypes = {"scalar": "bfloat16", "matrix": middle, "tensor": "float32"}
        g = {n: jnp.asarray(x, dtypes[n]) for n, x in G.items()} | {"none": None}
        h = sampled(name, g)
        assert h.pop("none") is None and g.pop("none") is None
        for n in G:
            assert_formula(name, h, g, middle if n == "matrix" else "float32", [n], rtol=1e-6)


@every_estimator
def test_only_the_weighted_sample_falls_when_another_leaf_grows(name):
    louder = G | {"tensor": 10 * G["tensor"]}
    quiet, loud = (np.asarray(sampled(name, cast(g, float))["matrix"]) for g in (G, louder))
    assert (loud < quiet).all() if name == "weighted" else (loud == quiet).all()


@every_estimator
def test_masked_leaves_are_left_out_also_of_the_norm(name):
    """A part of the tree is sampled as if it were the whole tree."""
    part, mask = {n: G[n] for n in ("matrix", "scalar")}, {n: n != "tensor" for n in G}
    tx = hessian_estimate(ESTIMATORS[name][0], decay=0.0, update_interval=1, bias_correction=False)
    tx, g = optax.masked(tx, mask), cast(G, float)
    h, state = tx.update(g, tx.init(g))
    exact = ESTIMATORS[name][1](part)
    for n in part:
        np.testing.assert_allclose(h[n], exact[n], rtol=1e-6)
    np.testing.assert_array_equal(h["tensor"], g["tensor"])
    assert isinstance(state.inner_state.h["tensor"], optax.MaskedNode)


@every_estimator
def test_no_gradient_is_no_curvature(name):
    for g in ({}, jax.tree.map(lambda x: jnp.zeros_like(x, float), G)):
        h = sampled(name, g)
        assert jax.tree.structure(h) == jax.tree.structure(g)
        assert all(not x.any() for x in jax.tree.leaves(h))


@every_estimator
def test_arguments_of_other_estimators_are_ignored(name):
    g = cast(G, float)
    h = sampled(name, g, obj_fn=None, logits_fn=None, inputs=None, axis_name=None, value=1.0)
    jax.tree.map(np.testing.assert_array_equal, h, sampled(name, g))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_one_coordinate_out_of_range_spoils_every_weighted_sample_and_none_is_taken(bad):
    """With an infinite norm, all other coordinates would be 0 and would enter the average."""
    g = cast(G, "float32")
    tx = hessian_estimate(weighted_squared_gradient(), decay=0.5, update_interval=1)
    _, state = tx.update(g, tx.init(g))
    spoiled = g | {"matrix": g["matrix"].at[1, 2].set(bad)}
    for extra in ({}, {"refresh": True}):
        _, after = tx.update(spoiled, state, **extra)
        jax.tree.map(np.testing.assert_array_equal, after.h, state.h)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bounded_sample_is_nan_if_the_norm_is_not_finite(bad):
    """The bound must not turn an infinite norm into a sample of 0."""
    g = {"spoilt": jnp.array([1.0, bad]), "other": jnp.ones(2)}
    h = weighted_squared_gradient(max_norm=5.0)(jax.random.key(0), None, g)
    assert jnp.isnan(h["other"]).all()
