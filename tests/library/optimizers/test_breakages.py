"""docs/breakages.md, row by row: how optax.contrib.sophia breaks, and what ours does instead."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import jit
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec
from places import ROOT

from sophia_optax import diagnostics, flax, hutchinson, sophia_h

PAGE = ROOT / "docs" / "breakages.md"


def theirs(**arguments):
    return optax.contrib.sophia(0.1, **arguments)


def ours(**arguments):
    return sophia_h(0.1, **arguments)


def squares(params):
    """Its Hessian is 2 I."""
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))


def tree(*dtypes):
    return {name: jnp.ones(2, dtype) for name, dtype in zip("wb", dtypes, strict=True)}


TREE = tree("float32", "float32")


def first_step(tx, params, obj_fn=squares, **extra):
    """(state, updates)"""

    @jit
    def update(params, state):
        return tx.update(jax.grad(obj_fn)(params), state, params, obj_fn=obj_fn, **extra)

    return update(params, tx.init(params))[::-1]


def finite(tree):
    return jnp.isfinite(jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])).all()


def counting(function):
    """(the function, a list that grows by one at each evaluation)."""
    calls = []

    def counted(*args, **extra):
        jax.debug.callback(lambda: calls.append(1))
        return function(*args, **extra)

    return counted, calls


def counted_sophias(**arguments):
    """Optax's Sophia and ours, each with a list of its estimator's evaluations."""
    estimator = optax.contrib.hutchinson_estimator_diag_hessian()
    counted, their_calls = counting(estimator.update)
    hessian = optax.GradientTransformationExtraArgs(estimator.init, counted)
    counted, our_calls = counting(hutchinson())
    return (theirs(hessian_diagonal_fn=hessian, **arguments), their_calls), (
        ours(estimator=counted, **arguments),
        our_calls,
    )


# ---------------------------------------------------------------- trees and dtypes


def test_masked_trees():
    only = {"w": True, "b": False}

    def product(params):
        return jnp.sum(params["w"] * params["b"])

    with pytest.raises(TypeError) as error:  # from inside the objective
        first_step(optax.masked(theirs(), only), TREE, product)
    assert "masked" not in str(error.value)
    with pytest.raises(ValueError, match=r"masked params.*hessian=sample"):
        first_step(optax.masked(ours(), only), TREE, product)
    route = optax.masked(ours(), only, mask_compatible_extra_args=True)
    updates, expected = (
        first_step(tx, TREE, product, hessian=TREE)[1]["w"] for tx in (route, ours())
    )
    np.testing.assert_array_equal(updates, expected)


def test_mixed_dtypes():
    mixed = tree("float32", "bfloat16")
    with pytest.raises(TypeError, match=r"tangent arguments to jax\.jvp do not match"):
        first_step(theirs(), mixed)
    _, updates = first_step(ours(), mixed)
    assert finite(updates) and updates["b"].dtype == "bfloat16"


def test_float16_nan():
    """0 / max(0, eps), and float16 has no 1e-8."""

    def first(params):
        return jnp.sum(params["w"][:1] ** 2)

    params = {"w": jnp.ones(2, "float16")}
    assert jnp.isnan(first_step(theirs(), params, first)[1]["w"][1])
    assert finite(first_step(ours(), params, first)[1])


def test_bfloat16_stall():
    """A curvature of 2, averaged two thousand times."""

    def averaged(tx, name):
        params = tree("bfloat16", "bfloat16")

        def body(state, _):
            return tx.update(params, state, params, obj_fn=squares)[1], None

        state = jit(lambda: jax.lax.scan(body, tx.init(params), length=2000)[0])()
        return optax.tree.get(state, name)["w"]

    arguments = {"update_interval": 1, "b2": 0.99}
    assert (averaged(theirs(**arguments), "nu") < 1.7).all()
    h = averaged(ours(**arguments), "h")
    assert h.dtype == "float32" and jnp.allclose(h, 2, rtol=1e-4)
    short = ours(**arguments, hessian_dtype="bfloat16")  # rounded stochastically
    assert jnp.allclose(averaged(short, "h"), 2, rtol=0.05)


def test_nan_for_ever():
    """One batch of seven takes a square root of 0: a finite gradient, but no finite curvature."""

    def run(tx, **extra):
        def body(carry, fitted):
            params, state = carry

            def obj_fn(params):
                gap = params["w"] - jax.lax.stop_gradient(params["w"])
                gap = jnp.where(fitted, gap, 1.0)
                return squares(params) + jnp.sum(jnp.sign(gap) * jnp.abs(gap) ** 1.5)

            grads = jax.grad(obj_fn)(params)
            updates, state = tx.update(grads, state, params, obj_fn=obj_fn, **extra)
            return (optax.apply_updates(params, updates), state), finite(grads)

        carry = (TREE, tx.init(TREE))
        return jit(lambda: jax.lax.scan(body, carry, jnp.arange(8) == 1))()

    (params, state), _ = run(theirs(update_interval=1))
    assert jnp.isnan(optax.tree.get(state, "nu")["w"]).all() and not finite(params)
    (params, state), gradient_is_finite = run(ours(), refresh=True)
    assert finite(params) and gradient_is_finite.all()
    assert diagnostics(state)["hessian_rejected"] == 1


def test_auxiliary_outputs():
    def with_aux(params):
        return squares(params), params

    def update(tx):
        return tx.update(TREE, tx.init(TREE), TREE, obj_fn=with_aux)

    with pytest.raises(TypeError, match="only defined for scalar-output") as error:
        update(theirs())
    assert "obj_fn" not in str(error.value)
    with pytest.raises(TypeError, match=r"Drop the auxiliary output: `obj_fn=.*\[0\]`"):
        update(ours())


def test_nested_custom_vjp():
    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))

    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * square(x) * g,))

    def cubes(params):
        return sum(jnp.sum(cube(x)) for x in jax.tree.leaves(params))

    for tx in (theirs(), ours()):
        with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
            first_step(tx, TREE, cubes)
    tx = ours(estimator=hutchinson(mode="reverse"), debias_hessian=False, b2=0.0)
    h = optax.tree.get(first_step(tx, TREE, cubes)[0], "h")
    np.testing.assert_allclose(h["w"], 6, rtol=1e-6)


# ---------------------------------------------------------------- programs


def test_donated_key():
    """The state of optax's Sophia holds the key object that the caller passed."""
    key = jax.random.key(0)
    hessian = optax.contrib.hutchinson_estimator_diag_hessian(key)
    seed = jnp.asarray(0)

    def twice(tx):
        donated = jax.jit(
            lambda state: tx.update(TREE, state, TREE, obj_fn=squares), donate_argnums=0
        )
        for _ in range(2):
            donated(tx.init(TREE))

    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        twice(theirs(hessian_diagonal_fn=hessian))
    assert key.is_deleted()
    twice(ours(seed=seed))
    assert not seed.is_deleted()


def test_multi_steps():
    """Four micro-steps of one step at which a refresh is due."""
    for (tx, calls), told in zip(counted_sophias(), (False, True), strict=True):
        multi = optax.MultiSteps(tx, 4)

        @jit
        def micro_step(state, last, multi=multi, told=told):
            extra = {"refresh": last} if told else {}
            return multi.update(TREE, state, TREE, obj_fn=squares, **extra)[1]

        state = multi.init(TREE)
        for n in range(4):
            state = micro_step(state, n == 3)
        jax.effects_barrier()
        assert len(calls) == (1 if told else 4)


def test_vmapped_cond():
    """Ten steps, every fifth due: `vmap` turns a cond into a select of both branches."""
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), TREE)
    for (tx, calls), told in zip(counted_sophias(update_interval=5), (False, True), strict=True):

        def update(params, state, tx=tx, **extra):
            return tx.update(params, state, params, obj_fn=squares, **extra)[1]

        programs = [
            jit(jax.vmap(lambda p, s, extra=extra: update(p, s, **extra)))
            for extra in (({"refresh": False}, {"refresh": True}) if told else ({}, {}))
        ]
        state = jax.vmap(tx.init)(stacked)
        for n in range(10):
            state = programs[n % 5 == 0](stacked, state)
        jax.effects_barrier()
        assert len(calls) == (2 if told else 10)


def test_shard_map():
    """In shard_map the gradient with respect to unsharded parameters is a sum over shards."""
    P, mesh = PartitionSpec, jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch = jnp.arange(16.0).reshape(8, 2)
    exact = 2 * np.mean(batch**2, axis=0) / 2

    def curvature(tx, name):
        def shard(x, batch):
            def loss(x):
                return jnp.mean((batch * x) ** 2)

            _, state = tx.update(jnp.zeros(2), tx.init(x), x, obj_fn=loss)
            return optax.tree.get(state, name)

        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        return jit(jax.shard_map(shard, mesh=mesh, **specs))(jnp.ones(2), batch)

    np.testing.assert_allclose(curvature(theirs(b2=0.0), "nu"), 8 * exact, rtol=1e-5)
    np.testing.assert_allclose(curvature(ours(b2=0.0, axis_name="data"), "h"), exact, rtol=1e-5)
    with pytest.raises(ValueError, match="Pass `axis_name='data'`"):
        curvature(ours(b2=0.0), "h")


def test_printing(capsys):
    def printed(tx):
        step = jit(lambda state: tx.update(TREE, state, TREE, obj_fn=squares)[1])
        state = step(step(tx.init(TREE)))
        jax.effects_barrier()
        return len(capsys.readouterr().out.splitlines()), state

    assert printed(theirs())[0] == 0
    assert printed(theirs(verbose=True))[0] == 2  # documented: "0 to turn off", the default
    lines, state = printed(ours())
    assert lines == 0 and "win_rate" in diagnostics(state)


# ---------------------------------------------------------------- Flax


def test_train_state():
    def apply(tx):
        state = TrainState.create(apply_fn=None, params=TREE, tx=tx)
        return state.apply_gradients(grads=TREE, obj_fn=squares)

    with pytest.raises(ValueError, match=r"^obj_fn must be provided to hutchinson"):
        apply(theirs())
    with pytest.raises(ValueError, match=r"needs `obj_fn`, which was not passed. Pass `obj_fn="):
        apply(ours())
    state = flax.TrainState.create(apply_fn=None, params=TREE, tx=ours())
    state = state.apply_gradients(grads=TREE, obj_fn=squares)
    assert optax.tree.get(state.opt_state, "accepted") == 1


class Module(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))

    def loss(self):
        return jnp.sum(self.w[...] ** 2)


def test_nnx():
    """nnx.Optimizer passes extra arguments on; the objective gets parameters, not a module."""
    model = Module()
    graph, params = nnx.split(model)
    for tx in (theirs(), ours()):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        with pytest.raises(TypeError, match="'State' object is not callable"):
            optimizer.update(model, params, obj_fn=lambda model: model().loss())
        optimizer.update(model, params, obj_fn=lambda p: nnx.merge(graph, p).loss())
    optimizer.update(model, params, obj_fn=flax.of_params(lambda model: model.loss(), model))


def test_the_page_has_a_row_for_each():
    rows = re.findall(r"^\| (\w[\w ]*) \|", PAGE.read_text(), re.MULTILINE)
    tests = {name for name in globals() if name.startswith("test_")}
    assert {f"test_{row.replace(' ', '_')}" for row in rows} == tests - {
        "test_the_page_has_a_row_for_each"
    }
    assert len(rows) == 14
