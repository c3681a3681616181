"""trust_region: dtypes, buffers, gradients that are zero or not finite, and its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from paths import SHAPES, cast
from regions import LR, RULES, G, T, every_rule, ratio, region, scalars, updated

from sophia_optax import soaa, trust_region


@every_rule
@pytest.mark.parametrize(
    ("dtype", "held"),
    [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_scalars_are_float32_or_float64_where_a_parameter_is(dtype, held, rule):
    with jax.enable_x64(True):
        tx = region(ratio(), learning_rate=lambda t: LR / (t + 1), rule=rule)
        g, value = cast(G, dtype), jnp.asarray(3.0, "float64")
        state = jax.eval_shape(tx.init, g)
        u, after = jax.eval_shape(lambda g, s: tx.update(g, s, value=value), g, state)
        for s in (state, after):
            names = ("radius", "loss", "mass", "predicted")
            assert {getattr(s, n).dtype.name for n in names} == {held}
            assert s.count.dtype == "int32"
        assert {x.dtype.name for x in jax.tree.leaves(u)} == {dtype}


@pytest.mark.parametrize(("rule", "moments"), [("soaa", 1), ("tadam", 2)])
def test_soaa_keeps_momentum_and_one_moment_and_its_parent_one_more(rule, moments):
    for mu, nu in ((None, None), ("bfloat16", "float32"), ("float32", "bfloat16")):
        tx = soaa(LR, T, rule=rule, mu_dtype=mu, hessian_dtype=nu)
        g = cast(G, "float32")
        state = jax.eval_shape(tx.init, g)
        u, state = jax.eval_shape(lambda g, s, tx=tx: tx.update(g, s, g, value=3.0), g, state)
        held = sorted(x.dtype.name for x in jax.tree.leaves(state) if x.shape == (3, 4))
        assert held == sorted([mu or "float32", *[nu or "float32"] * moments])
        assert u["matrix"].dtype == "float32"
        numbers = [x for x in jax.tree.leaves(state) if x.shape == ()]
        assert sum(x.dtype.itemsize for x in numbers) < 150


@every_rule
def test_every_scalar_has_a_buffer_of_its_own_and_may_be_donated(rule):
    g = cast(G, "float32")
    tx = soaa(LR, T, rule=rule)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    for init in (tx.init, jax.jit(tx.init)):
        state = init(g)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
        for _ in range(2):
            _, state = step(jax.tree.map(jnp.copy, g), state, g, value=jnp.asarray(2.0))
        assert state[0].count == 2


ZEROS = {n: np.zeros(s) for n, s in SHAPES.items()}


@every_rule
@pytest.mark.parametrize("g", [ZEROS, {}], ids=["zeros", "empty"])
def test_without_any_gradient_all_stays_finite(g, rule):
    for tx in (soaa(LR, T, rule=rule), region(optax.scale_by_adam(), rule=rule)):
        params = cast(g, "float32")
        state, step = tx.init(params), jax.jit(tx.update)
        for value in (3.0, 3.0, 2.0):
            u, state = step(params, state, params, value=value)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((u, state)))
        assert not any(x.any() for x in jax.tree.leaves(u))


@every_rule
def test_gradients_that_are_not_finite_leave_the_scalars_finite(rule):
    tx = region(optax.scale_by_adam(), rule=rule)
    _, state = updated(tx, radius=None, value=3.0)
    bad = G | {"matrix": np.full(SHAPES["matrix"], np.nan)}
    _, after = updated(tx, bad, state=state, radius=None, value=2.9)
    assert np.isfinite(scalars(after)).all() and after.predicted == state.predicted
    assert after.mass > state.mass


def test_our_own_arithmetic_needs_no_implicit_promotion():
    """Without bias correction of m, in which optax promotes."""
    g = {"a": jnp.ones((), jnp.bfloat16), "b": jnp.ones(3)}
    with jax.numpy_dtype_promotion("strict"):
        for rule in RULES:
            for direction in (optax.scale(2.0), ratio(debias=False)):
                tx = region(direction, rule=rule)
                jax.eval_shape(lambda s, v, tx=tx: tx.update(g, s, value=v), tx.init(g), 2.0)


@pytest.mark.parametrize("factory", [region, lambda **kw: soaa(LR, **({"total_steps": T} | kw))])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "tadan"}, "rule='tadan' is unknown; choose one of soaa, tadam"),
        ({"b1": 1.0}, r"b1=1.0 is outside \[0, 1\)"),
        ({"gamma": 1.5}, r"gamma=1.5 is outside \[0, 1"),
        ({"eps": -1e-8}, "eps=-1e-08 is outside"),
        ({"total_steps": 0}, "total_steps=0 must be an integer of at least 1"),
        ({"total_steps": 1.5}, "total_steps=1.5 must be an integer"),
    ],
)
def test_arguments_out_of_range_are_named(factory, arguments, message):
    with pytest.raises(ValueError, match=message):
        factory(**arguments)


@pytest.mark.parametrize(
    "factory",
    [
        lambda **kw: trust_region(optax.identity(), 0.1, total_steps=9, **kw),
        lambda **kw: soaa(0.1, 9, **kw),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"eps": 0.0}, "eps=0"), ({"gamma": 1.0}, r"gamma=1.0 is outside \[0, 1\)")],
)
def test_numbers_that_make_the_radius_nan_or_zero_for_good_are_refused(factory, arguments, message):
    for rule in ("soaa", "tadam"):
        with pytest.raises(ValueError, match=message):
            factory(rule=rule, **arguments)
