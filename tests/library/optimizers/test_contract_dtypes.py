"""Every optimizer of ours: dtypes, promotion, NaNs and leaves of other kinds."""

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
    accepted,
    classifier,
    every_factory,
    every_optimizer,
    gradient,
    jit,
    start,
    step,
)

pytestmark = pytest.mark.newest


@every_optimizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed", "float64"])
def test_updates_and_state_keep_their_dtypes(opt, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx, params = opt(), start(dtype)
        state = tx.init(params)
        update = functools.partial(tx.update, value=1.0, **EXTRA)
        updates, after = jax.eval_shape(lambda p, s: update(p, s, p), params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (params, state))
    wide = [x for x in jax.tree.leaves(state) if x.dtype == "float64"]
    assert bool(wide) == (dtype == "float64")


@every_optimizer
@pytest.mark.parametrize("dtype", ["float16", "mixed"])
def test_all_is_finite_where_float16_has_no_eps_and_coordinates_are_dead(opt, dtype):
    """A dead coordinate has no gradient, and so neither curvature nor momentum."""
    tx, params = opt(eps=1e-12), start(dtype)
    grads, value = jit(gradient)(params)
    assert not grads["w"][0].any()

    def update(grads, state):
        return tx.update(grads, state, params, refresh=True, **value, **EXTRA)

    updates, state = jit(update)(grads, tx.init(params))
    chex.assert_tree_all_finite((updates, state))
    assert set(accepted(state)) <= {1}


@every_optimizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_our_own_code_promotes_no_dtype_by_itself(opt, dtype, monkeypatch):
    """Under strict promotion; optax's own transformations are exempt."""

    def relieved(link):
        @functools.wraps(link)
        def make(*args, **kwargs):
            tx = link(*args, **kwargs)
            update = jax.numpy_dtype_promotion("standard")(tx.update)
            return optax.GradientTransformation(tx.init, update)

        return make

    for link in ("ema", "add_decayed_weights", "scale_by_learning_rate"):
        monkeypatch.setattr(optax, link, relieved(getattr(optax, link)))
    with jax.numpy_dtype_promotion("strict"):
        tx, params = opt(learning_rate=0.1), start(dtype)
        jax.eval_shape(lambda p, s: step(tx, p, s), params, tx.init(params))


@every_optimizer
def test_no_rank_is_promoted(opt):
    """Under `jax_numpy_rank_promotion="raise"`, which some projects use in their tests."""

    def logits_fn(params, batch):
        logits = params["s"] * (batch["x"] @ params["w"])
        return logits + jnp.broadcast_to(params["b"], logits.shape)

    def obj_fn(params, batch):
        logits = logits_fn(params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    batch = jax.tree.map(jnp.asarray, BATCH)
    extra = {"obj_fn": obj_fn, "logits_fn": logits_fn, "inputs": batch, "value": 1.0}
    tx, params = opt(learning_rate=0.1), start()
    with jax.numpy_rank_promotion("raise"):
        updates, _ = jax.eval_shape(
            lambda p, s: tx.update(p, s, p, **extra), params, tx.init(params)
        )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@every_factory
def test_debug_nans_finds_none(opt):
    """No intermediate NaN either: at a refresh, between refreshes, or on dead coordinates."""
    tx, params = opt(learning_rate=0.1), start()
    with jax.debug_nans(True):
        state, program = tx.init(params), jit(functools.partial(step, tx))
        for _ in range(2):
            params, state = program(params, state)
    chex.assert_tree_all_finite((params, state))


# ---------------------------------------------------------------- leaves of other kinds


@every_optimizer
@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
def test_leaves_that_are_no_real_numbers_are_refused_by_name(opt, dtype):
    params = start() | {"odd": jnp.ones(2, dtype)}
    with pytest.raises(ValueError, match=rf"params\['odd'\] is {dtype}"):
        opt().init(params)


@every_factory
def test_a_number_of_python_is_a_parameter(opt):
    tx, x = opt(), 0.5
    extra = classifier(lambda p, x: jnp.concatenate([p * x, 1 - x], 1))
    grads = {"x": jnp.asarray(0.1)}
    extra = {n: f if n in ("inputs", "value") else _of_x(f) for n, f in extra.items()}
    updates = [
        tx.update(grads, tx.init(p), p, refresh=True, **extra)[0]["x"]
        for p in ({"x": x}, {"x": jnp.asarray(x)})
    ]
    np.testing.assert_allclose(*updates, rtol=1e-6)
    assert updates[0] < 0


def _of_x(function):
    return lambda params, inputs: function(params["x"], inputs)


@every_optimizer
def test_a_short_gradient_does_not_cut_the_step_of_a_wide_parameter(opt):
    """Without weight decay, which would widen a step that was cut before it."""
    tx, params = opt(weight_decay=0.0), start()
    grads = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    updates, _ = jax.eval_shape(
        lambda g, s, p: tx.update(g, s, p, value=1.0, **EXTRA), grads, tx.init(params), params
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
