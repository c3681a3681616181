"""What every optimizer of ours must bear, by itself: one table, optimizers by rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    EXACT,
    EXTRA,
    X,
    all_finite,
    assert_close,
    every_optimizer,
    obj_fn,
    run,
    start,
    step,
    types,
)


@every_optimizer
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed", "float64"])
def test_updates_keep_the_dtypes_of_parameters_and_all_is_finite(opt, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx, params = opt(), start(dtype)

        def update(grads, state):
            return tx.update(grads, state, params, refresh=True, **EXTRA)

        state = tx.init(params)
        updates, after = jax.jit(update)(params, state)
        assert types(updates) == types(params) and types(after) == types(state)
        assert all_finite((updates, after)) and optax.tree.get(after, "accepted") == 1


@every_optimizer
def test_scan_carries_parameters_and_state_and_it_descends(opt):
    params, state = opt.plain
    assert types(params) == types(start()) and types(state) == types(opt().init(start()))
    assert all_finite((params, state))
    assert obj_fn(params, X) < 0.7 * obj_fn(start(), X)


@every_optimizer
@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_cond_carries_parameters_and_state(opt, dtype):
    tx, params = opt(), start(dtype)

    def maybe(pred, params, state):
        return jax.lax.cond(pred, lambda *c: step(tx, *c), lambda *c: c, params, state)

    carry = (params, tx.init(params))
    assert types(jax.eval_shape(maybe, True, *carry)) == types(carry)


@every_optimizer
def test_donated_state_compiles_once_under_a_schedule_and_inits_again(opt):
    traces, ends = [], []
    tx = opt(learning_rate=optax.cosine_decay_schedule(0.05, 10))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def donated(params, state):
        traces.append(1)
        return step(tx, params, state)

    for _ in range(2):
        params = start()
        state = jax.jit(tx.init)(params)
        for _ in range(5):
            params, state = donated(params, state)
        ends.append(params)
    assert len(traces) == 1
    assert_close(*ends, **EXACT)


@every_optimizer
def test_unknown_extra_arguments_are_ignored(opt):
    tx, params = opt(), start()
    known, unknown = (
        jax.make_jaxpr(lambda s, extra=extra: step(tx, params, s, **extra))(tx.init(params))
        for extra in ({}, {"unknown": object(), "value": 1.0})
    )
    assert str(known) == str(unknown)


@every_optimizer
def test_vmap_over_seeds_is_one_run_per_seed(opt):
    def of_seed(seed):
        params, state = run(opt(seed=seed), start())
        return params, optax.tree.get(state, "h")

    params, h = jax.jit(jax.vmap(of_seed))(jnp.array([0, 5]))
    assert_close(jax.tree.map(lambda x: x[0], params), opt.plain[0], **opt.tolerance)
    assert not np.allclose(h["w"][0], h["w"][1])


@every_optimizer
def test_eval_shape_of_init_is_init(opt):
    tx = opt()
    assert types(jax.eval_shape(tx.init, start())) == types(tx.init(start()))


@every_optimizer
def test_map_params_finds_momentum_and_curvature(opt):
    tx, names = opt(), {"w": "w", "b": "b", "s": "s"}
    mapped = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(start()), names, transform_non_params=lambda _: "-"
    )
    leaves = jax.tree.leaves(mapped)
    assert sorted(leaf for leaf in leaves if leaf != "-") == ["b", "b", "s", "s", "w", "w"]


@every_optimizer
def test_eight_devices_equal_one(opt):
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"w": P("data"), "b": P(), "s": P()}
    shard = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
    inputs = jax.device_put(X, jax.NamedSharding(mesh, P("data")))
    program = jax.jit(lambda params, inputs: run(opt(), params, inputs=inputs))
    params, state = program(jax.device_put(start(), shard), inputs)
    assert len(params["w"].sharding.device_set) == 8
    assert_close(params, opt.plain[0], **opt.tolerance)
    h, expected = (optax.tree.get(s, "h") for s in (state, opt.plain[1]))
    assert_close(h, expected, **opt.tolerance)


@every_optimizer
def test_none_leaves_are_left_alone(opt):
    tx, params = opt(), start() | {"none": None}
    state = tx.init(params)
    updates, after = jax.eval_shape(lambda p, s: tx.update(p, s, p, **EXTRA), params, state)
    assert types(updates) == types(params) and types(after) == types(state)


def classifier(logits):
    """The extra arguments of a model of two classes, all of one label."""

    def loss(params, inputs):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, inputs), jnp.zeros(4, int)
        )
        return losses.mean()

    return {"inputs": jnp.ones((4, 1)), "logits_fn": logits, "obj_fn": loss}


@every_optimizer
def test_a_scalar_is_a_tree(opt):
    tx, x = opt(), jnp.asarray(0.5)
    extra = classifier(lambda p, x: jnp.concatenate([p * x, 1 - x], 1))
    update = jax.jit(lambda x, state: tx.update(x, state, x, refresh=True, **extra))
    updates, state = update(x, tx.init(x))
    assert types(updates) == types(x) and all_finite((updates, state))
    assert optax.tree.get(state, "accepted") == 1


@every_optimizer
def test_an_empty_tree_is_a_tree(opt):
    tx, extra = opt(), classifier(lambda p, x: jnp.concatenate([x, 1 - x], 1))
    state = tx.init({})
    updates, after = jax.eval_shape(lambda s: tx.update({}, s, {}, **extra), state)
    assert updates == {} and types(after) == types(state)
