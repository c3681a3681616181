"""Every optimizer of ours: tracing, transformations of jax, extra arguments and trees."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    BATCH,
    EXTRA,
    STEPS,
    accepted,
    assert_close,
    classifier,
    every_factory,
    every_optimizer,
    gradient,
    jit,
    obj_fn,
    run,
    start,
    step,
)

pytestmark = pytest.mark.newest


@every_optimizer
def test_every_number_that_the_signature_declares_is_listed(opt):
    """Among `numbers`, which are traced, or `arguments`, which are static or unused."""
    assert opt.traceable - set(opt.arguments) == set(opt.numbers)


@every_optimizer
def test_every_number_may_be_traced_and_changes_where_it_leads(opt):
    """One lane runs as listed, and one for each number with that number changed."""
    listed = opt.numbers | {"learning_rate": 0.1}
    another = {n: x + 1 if isinstance(x, int) else 0.7 * x for n, x in listed.items()}
    lanes = [listed, *(listed | {n: x} for n, x in another.items())]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *lanes)
    params, _ = jit(jax.vmap(lambda numbers: run(opt(**numbers), start())))(stacked)
    moved = jnp.abs(params["w"][1:] - params["w"][0]).max((1, 2))
    assert dict(zip(another, moved > 1e-5, strict=True)) == dict.fromkeys(another, True)


@every_factory
def test_none_in_the_gradient_is_none_in_the_update(opt):
    """As with `optax.adamw`; the other leaves move as if that gradient were 0."""
    tx, params = opt(learning_rate=0.1), start()
    extra = {"value": 1.0, **EXTRA}
    grads = gradient(params)[0]
    nothing = grads | {"b": jnp.zeros_like(grads["b"])}

    def update(grads):
        return tx.update(grads, tx.init(params), params, **extra)

    updates, state = jit(update)(grads | {"b": None})
    expected, expected_state = jit(update)(nothing)
    assert updates.pop("b") is None and expected.pop("b") is not None
    assert_close(updates, expected, **opt.tolerance)
    assert_close(state, expected_state, **opt.tolerance)


# ---------------------------------------------------------------- transformations of jax


@every_optimizer
def test_scan_carries_parameters_and_state_and_it_descends(opt):
    params, state = opt.plain
    chex.assert_trees_all_equal_shapes_and_dtypes((params, state), (start(), opt().init(start())))
    chex.assert_tree_all_finite((params, state))
    assert obj_fn(params, BATCH) < 0.5 * obj_fn(start(), BATCH)


@every_optimizer
@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_cond_carries_parameters_and_state(opt, dtype):
    tx, params = opt(), start(dtype)

    def maybe(pred, params, state):
        return jax.lax.cond(pred, lambda *c: step(tx, *c), lambda *c: c, params, state)

    carry = (params, tx.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(maybe, True, *carry), carry)


@every_optimizer
def test_donated_state_compiles_once_under_a_schedule_and_inits_again(opt):
    tx = opt()
    chex.clear_trace_counter()  # which knows functions by their source

    @functools.partial(jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def donated(params, state):
        return step(tx, params, state)

    for init in (tx.init, jax.jit(tx.init)):
        params = start()
        state = init(params)
        for _ in range(STEPS):
            params, state = donated(params, state)
        assert_close((params, state), opt.plain, **opt.tolerance)


@every_optimizer
def test_it_reads_the_extra_arguments_listed_and_ignores_all_others(opt):
    tx, params = opt(), start()
    needed = {n: x for n, x in EXTRA.items() if n in opt.reads}

    def program(**extra):
        return str(jax.make_jaxpr(lambda s: tx.update(params, s, params, **extra))(tx.init(params)))

    plain = program(**needed)
    assert program(**EXTRA, unknown=object()) == plain
    for name, x in {"hessian": params, "refresh": True, "value": 2.0}.items():
        assert (program(**needed, **{name: x}) != plain) == (name in opt.reads)


@every_optimizer
def test_vmap_is_one_run_for_each_seed_and_state(opt):
    """The last lane starts at another count, so `lax.cond` refreshes only some lanes."""
    first = (start(), opt().init(start()))

    def one(seed, params, state):
        return run(opt(seed=seed) if "seed" in opt.parameters else opt(), params, state)

    lanes = jax.tree.map(lambda *x: jnp.stack(x), first, first, opt.plain)
    runs = jit(jax.vmap(one))(jnp.array([0, 5, 0]), *lanes)
    same, other, later = (jax.tree.map(lambda x: x[i], runs) for i in range(3))  # noqa: B023
    assert_close(same, opt.plain, **opt.tolerance)
    assert_close(later, opt.program(*opt.plain), **opt.tolerance)
    if opt.model:
        assert not np.allclose(same[0]["w"], other[0]["w"])


@every_optimizer
def test_eval_shape_of_init_is_init(opt):
    tx = opt()
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, start()), tx.init(start())
    )


# ---------------------------------------------------------------- trees


@every_optimizer
def test_map_params_finds_every_moment(opt):
    tx, names = opt(), {"w": "w", "b": "b", "s": "s"}
    mapped = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(start()), names, transform_non_params=lambda _: "-"
    )
    found = [name for name in jax.tree.leaves(mapped) if name != "-"]
    paths = [path for path, _ in jax.tree.leaves_with_path(tx.init(start()))]
    expected = [path[-1].key for path in paths if isinstance(path[-1], jax.tree_util.DictKey)]
    assert sorted(found) == sorted(expected) and set(found) == set(names)


@every_optimizer
def test_none_leaves_are_left_alone(opt):
    tx, params = opt(), start() | {"none": None}
    state = tx.init(params)
    updates, after = jax.eval_shape(lambda p, s: tx.update(p, s, p, **EXTRA), params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (params, state))


@every_optimizer
def test_a_scalar_is_a_tree(opt):
    tx, x = opt(), jnp.asarray(0.5)
    extra = classifier(lambda p, x: jnp.concatenate([p * x, 1 - x], 1))
    update = jit(lambda x, state: tx.update(x, state, x, refresh=True, **extra))
    updates, state = update(x, tx.init(x))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, x)
    chex.assert_tree_all_finite((updates, state))
    assert updates < 0 and set(accepted(state)) <= {1}


@every_optimizer
def test_an_empty_tree_is_a_tree(opt):
    tx, extra = opt(), classifier(lambda p, x: jnp.concatenate([x, 1 - x], 1))
    state = tx.init({})
    updates, after = jax.eval_shape(lambda s: tx.update({}, s, {}, **extra), state)
    assert updates == {}
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
