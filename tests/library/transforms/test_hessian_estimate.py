"""hessian_estimate: when it samples, which sample it takes, and which arguments it rejects."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_optax import hessian_estimate, sophia_h, squared_gradient

PARAMS = {"a": jnp.zeros(()), "b": jnp.zeros((2, 3))}
FROM_ESTIMATOR, FROM_CALLER = 2.0, 5.0


def full(value):
    return jax.tree.map(lambda x: jnp.full_like(x, value), PARAMS)


def constant(calls=None, value=FROM_ESTIMATOR):
    """An estimator that counts how often it runs (not how often it is traced)."""

    def estimator(key, params, updates, **unused):
        if calls is not None:
            jax.debug.callback(lambda: calls.append(1))
        return jax.tree.map(lambda g: jnp.full(g.shape, value, jnp.float32), updates)

    return estimator


def unwanted(key, params, updates, **unused):
    raise AssertionError("this refresh was not asked for")


def given_sample(key, params, updates, *, sample, **unused):
    return sample


def estimate(estimator=unwanted, *, decay=0.0, bias_correction=False, **arguments):
    """By default the output is the last sample, so that h shows where it came from."""
    return hessian_estimate(estimator, decay=decay, bias_correction=bias_correction, **arguments)


def leaf(tree):
    return float(tree["b"][0, 0])


def primitives(function, *args):
    return set(re.findall(r" = (\w+)[\[ ]", str(jax.make_jaxpr(function)(*args))))


# ---------------------------------------------------------------- when a sample is taken

ARRAY = "array"  # a boolean array that is an argument of the compiled program
REFRESHES = [None, True, np.True_, ARRAY, False, np.False_]


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("refresh", REFRESHES)
def test_refresh_and_hessian_say_which_sample_is_taken(refresh, given, jitted, count):
    for array in (True, False) if refresh is ARRAY else (None,):
        calls = []
        tx = estimate(constant(calls), update_interval=3)
        state = tx.init(PARAMS)._replace(count=jnp.asarray(count, jnp.int32))
        hessian = full(FROM_CALLER) if given else None

        def update(state, array, tx=tx, hessian=hessian):
            now = array if refresh is ARRAY else refresh
            return tx.update(full(1.0), state, hessian=hessian, refresh=now)

        h, state = (jax.jit(update) if jitted else update)(state, array and jnp.asarray(array))
        jax.effects_barrier()
        by_rule = given or count == 0 if refresh is None else bool(refresh)
        due = by_rule if array is None else array
        assert leaf(h) == (0.0 if not due else FROM_CALLER if given else FROM_ESTIMATOR)
        assert len(calls) == (due and not given)
        assert (state.accepted, state.age, state.count) == (due, not due, count + 1)


@pytest.mark.parametrize("refresh", [False, np.False_])
@pytest.mark.parametrize("extra", [{}, {"hessian": full(FROM_CALLER)}])
def test_a_false_refresh_never_calls_the_estimator(refresh, extra):
    tx = estimate(unwanted)
    h, _ = tx.update(full(1.0), tx.init(PARAMS), refresh=refresh, **extra)
    assert leaf(h) == 0.0
    tx = sophia_h(0.1)  # no obj_fn is passed, and none is needed
    tx.update(full(1.0), tx.init(PARAMS), PARAMS, refresh=refresh, **extra)


@pytest.mark.parametrize(
    ("refresh", "given", "has_cond"),
    [
        (None, False, True),
        (None, True, False),
        (True, False, False),
        (np.True_, True, False),
        (False, False, False),
        (np.False_, True, False),
        (ARRAY, False, True),
        (ARRAY, True, True),
    ],
)
def test_a_static_choice_leaves_no_cond_in_the_program(refresh, given, has_cond):
    tx = estimate(constant())

    def update(state, array):
        now = array if refresh is ARRAY else refresh
        return tx.update(full(1.0), state, hessian=full(5.0) if given else None, refresh=now)

    assert ("cond" in primitives(update, tx.init(PARAMS), jnp.asarray(True))) == has_cond


@pytest.mark.parametrize("k", [1, np.int64(1), 1.0])
def test_sampling_at_every_update_leaves_no_cond_in_the_program(k):
    tx = estimate(constant(), update_interval=k)
    assert "cond" not in primitives(lambda s: tx.update(full(1.0), s), tx.init(PARAMS))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_counter_samples_at_0_k_2k(k):
    tx = estimate(constant(), update_interval=k)

    def step(state, _):
        state = tx.update(full(1.0), state)[1]
        return state, (state.accepted, state.age)

    _, (accepted, age) = jax.lax.scan(step, tx.init(PARAMS), length=11)
    counts = np.arange(11)
    np.testing.assert_array_equal(accepted, counts // k + 1)
    np.testing.assert_array_equal(age, counts % k)


def test_the_key_is_that_of_seed_and_count():
    def estimator(key, params, updates, **unused):
        return jax.tree.map(lambda g: jax.random.normal(key, g.shape), updates)

    tx = estimate(estimator, update_interval=2, seed=2**32 - 5)
    state = tx.init(PARAMS)
    for count in range(3):
        h, state = tx.update(full(1.0), state)
        key = jax.random.fold_in(jax.random.key(2**32 - 5), count // 2 * 2)
        np.testing.assert_allclose(h["b"], jax.random.normal(key, (2, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("refresh", "message"),
    [
        ("False", "not 'False'"),
        (1, "not 1"),
        (jnp.ones(1, bool), "boolean array of shape ()"),
        (jnp.ones((), int), "boolean array of shape ()"),
        (optax.MaskedNode(), "wrap params in a dict"),
    ],
)
def test_a_refresh_that_is_no_bool_is_refused(refresh, message):
    tx = estimate(constant())
    with pytest.raises(TypeError, match=re.escape(message)):
        tx.update(full(1.0), tx.init(PARAMS), refresh=refresh)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        ({"a": jnp.zeros(())}, "`hessian` must have the structure of the gradient,"),
        ({"a": jnp.zeros(()), "b": jnp.zeros(3)}, r"`hessian` has shape \(3,\) at \['b'\]"),
        ([jnp.zeros(()), jnp.zeros((2, 3))], "`hessian` must have the structure"),
    ],
)
@pytest.mark.parametrize("refresh", [None, True, False])
def test_a_given_sample_of_the_wrong_shape_is_refused(hessian, message, refresh):
    tx = estimate()
    with pytest.raises(ValueError, match=message):
        tx.update(full(1.0), tx.init(PARAMS), hessian=hessian, refresh=refresh)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0 is outside \[0, 1\)"),
        ({"decay": -0.5}, "decay=-0.5 is outside"),
        ({"decay": float("nan")}, "decay=nan is outside"),
        ({"update_interval": 0}, "update_interval=0 must be an integer of at least 1"),
        ({"update_interval": 2.5}, "update_interval=2.5 must be an integer"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        hessian_estimate(squared_gradient(), **arguments)


def test_traced_arguments_pass():
    @jax.jit
    def run(decay, k, seed):
        tx = hessian_estimate(constant(), decay=decay, update_interval=k, seed=seed)
        _, state = tx.update(full(1.0), tx.init(PARAMS))
        return tx.update(full(1.0), state)[1]

    for k, accepted in ((1, 2), (2, 1)):
        state = run(0.75, k, 3)
        assert state.accepted == accepted
        np.testing.assert_allclose(state.mass, 1 - 0.75**accepted)


def test_alone_its_output_is_none_where_the_gradient_is():
    tx = hessian_estimate(squared_gradient(), update_interval=1)
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    h, _ = tx.update({"a": 2 * jnp.ones(2), "b": None}, tx.init(params), params)
    assert h["b"] is None
    np.testing.assert_allclose(h["a"], 4, rtol=1e-6)


def test_a_given_sample_may_be_none_where_the_gradient_is():
    tx, params = hessian_estimate(None, decay=0.5), {"a": jnp.ones(2), "b": jnp.ones(3)}
    part = {"a": 2 * jnp.ones(2), "b": None}
    h, state = tx.update(part, tx.init(params), params, hessian=part)
    assert h["b"] is None and not state.h["b"].any()
    np.testing.assert_allclose(h["a"], 2, rtol=1e-6)
