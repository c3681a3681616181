"""Zero samples and momentum that is not finite are counted in the diagnostics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_optax import (
    diagnostics,
    ema,
    gauss_newton_bartlett,
    hessian_estimate,
    orthosoph,
    soaa,
    sophia_g,
    sophia_geometric,
    sophia_h,
    sophia_lite,
)

X = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)), jnp.float32)
W = jnp.ones((3, 4)) + jnp.arange(4.0)


def batch_norm(x):
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)


def after_one_sample(groups, params=W, logits_fn=lambda W, x: batch_norm(x) @ W, **arguments):
    tx = sophia_g(0.1, estimator=gauss_newton_bartlett(groups=groups), **arguments)
    _, state = tx.update(params, tx.init(params), params, logits_fn=logits_fn, inputs=X)
    return diagnostics(state, quantiles=())


# ---------------------------------------------------------------- samples of 0


@pytest.mark.parametrize(("groups", "zero"), [(1, 0), (32, 0), (64, 1)])
def test_a_sample_of_zero_is_counted_as_by_batch_norm_of_one_row(groups, zero):
    """The statistics of one row normalise it to 0, whatever the row."""
    found = after_one_sample(groups)
    assert found["hessian_zero_samples"] == zero and found["hessian_zero_leaves"] == zero
    assert (found["hessian_norm"] == 0) == bool(zero)
    assert found["hessian_accepted"] == 1


def test_a_leaf_of_zeros_beside_others_is_counted_as_a_leaf():
    params = {"w": W, "b": jnp.zeros(4)}
    found = after_one_sample(64, params, lambda p, x: batch_norm(x) @ p["w"] + p["b"])
    assert (found["hessian_zero_samples"], found["hessian_zero_leaves"]) == (0, 1)


@pytest.mark.parametrize("groups", [1, 64])
def test_where_nothing_is_live_shares_of_what_is_live_are_nan(groups):
    """Numbers would mislead: a win rate of 1 with every coordinate at the floor."""
    found, dead = after_one_sample(groups), groups == 64
    assert np.isnan(found["win_rate"]) == np.isnan(found["clipped_fraction"]) == dead
    assert (found["floored_fraction"] == 1) == dead


def test_before_the_first_refresh_no_share_is_claimed():
    found = diagnostics(sophia_h(0.1).init(W))
    assert np.isnan(found["win_rate"]) and np.isnan(found["clipped_fraction"])


def test_zero_samples_of_a_linear_objective_are_averaged_as_well():
    """The estimator returned them, so leaving them out would bias the average."""
    tx = hessian_estimate(None, decay=0.5)
    state = tx.init(W)
    for sample in (W, jnp.zeros_like(W)):
        h, state = tx.update(W, state, W, hessian=sample)
    np.testing.assert_allclose(h, W * 0.25 / 0.75, rtol=1e-6)
    assert (state.accepted, state.zero, state.zero_leaves) == (2, 1, 1)


def test_a_sample_that_is_refused_is_not_a_sample_of_zero():
    tx = hessian_estimate(None)
    _, state = tx.update(W, tx.init(W), W, hessian=W * jnp.nan)
    assert (state.rejected, state.zero, state.zero_leaves) == (1, 0, 0)
    both = {"a": W, "b": W}
    state = tx.init(both)
    for sample in (both, {"a": jnp.zeros_like(W), "b": W * jnp.nan}):
        _, state = tx.update(both, state, both, hessian=sample)
    assert (state.rejected, state.zero_leaves) == (1, 0)


def test_signs_that_cancel_are_no_leaf_of_zeros():
    tx, g = hessian_estimate(None), jnp.array([1.0, -1.0])
    _, state = tx.update(g, tx.init(g), hessian=g)
    assert (state.accepted, state.zero, state.zero_leaves) == (1, 0, 0)


@pytest.mark.parametrize("empty", [{}, {"a": jnp.zeros((0, 3))}])
def test_a_tree_without_numbers_is_no_sample_of_zero(empty):
    tx = hessian_estimate(None)
    _, state = tx.update(empty, tx.init(empty), hessian=empty)
    assert (state.accepted, state.zero, state.zero_leaves) == (1, 0, 0)


# ---------------------------------------------------------------- momentum that is not finite

X2 = jnp.ones(2)
SPOILT, ORDINARY = jnp.array([jnp.inf, 1.0]), jnp.array([0.1, 0.1])
MAKERS = {
    "sophia_h": lambda: sophia_h(0.1, update_interval=3),
    "sophia_lite": lambda: sophia_lite(0.1, statistics=True),
    "sophia_geometric": lambda: sophia_geometric(0.1, statistics=True),
    "soaa": lambda: soaa(0.1, total_steps=100),
    "orthosoph": lambda: orthosoph(0.1),
    "optax.adam": lambda: optax.adam(0.1),
}


def square(x):
    return jnp.sum(x**2)


def steps_after(tx, spoilt, number=4):
    """(last update, state) after ordinary gradients that follow a spoilt one."""
    tx, state = optax.with_extra_args_support(tx), tx.init(X2)
    update = jax.jit(lambda g, state: tx.update(g, state, X2, obj_fn=square, value=1.0))
    for g in (ORDINARY, spoilt, *[ORDINARY] * number):
        updates, state = update(g, state)
    return updates, state


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_coordinate_whose_gradient_was_not_finite_shows_in_the_parameter(name, bad):
    """As with `optax.adam`. A clipped step would stay at the bound for ever."""
    updates, _ = steps_after(MAKERS[name](), jnp.array([bad, 1.0]))
    assert not np.isfinite(updates[0])
    if name not in ("soaa", "optax.adam"):  # soaa sums over the tree
        assert np.isfinite(updates[1])


@pytest.mark.parametrize("name", ["sophia_h", "sophia_lite", "sophia_geometric"])
def test_diagnostics_count_the_leaves(name):
    tx, params = MAKERS[name](), {"a": X2, "b": X2, "c": X2}
    extra = {"obj_fn": lambda p: sum(map(square, p.values())), "refresh": True}
    update = jax.jit(lambda g, state: tx.update(g, state, params, **extra)[1])
    for bad, number in (((), 0), ("b", 1), ("ab", 2)):
        grads = {n: SPOILT if n in bad else ORDINARY for n in params}
        state = update(grads, tx.init(params))
        for _ in range(3):
            state = update(jax.tree.map(lambda _: ORDINARY, params), state)
        assert diagnostics(state)["momentum_nonfinite_leaves"] == number


@pytest.mark.parametrize("name", MAKERS)
def test_apply_if_finite_leaves_the_gradient_out(name):
    guarded = optax.apply_if_finite(optax.with_extra_args_support(MAKERS[name]()), 3)
    updates, _ = steps_after(guarded, SPOILT)
    assert np.isfinite(updates).all()


def test_a_denominator_that_underflows_is_still_clipped():
    """The ratio overflows, although the momentum is finite."""
    tx = sophia_h(0.1, eps=0.0, b1=0.0, weight_decay=0.0)
    updates, _ = tx.update(jnp.array([1e3, -1e3]), tx.init(X2), X2, hessian=jnp.zeros(2))
    np.testing.assert_allclose(updates, [-0.1, 0.1], rtol=1e-6)


def test_first_moment_takes_what_comes():
    tx = ema(0.9)
    m, _ = tx.update(SPOILT, tx.init(X2))
    assert np.isinf(m[0]) and np.isfinite(m[1])
