"""Random keys in `inputs`: one key for all rows, or one key per row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moments import jit

from sophia_optax import gauss_newton_bartlett, hutchinson, value_grad_and_hessian

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
PARAMS = {"w": jnp.ones((3, 2))}
KEY = jax.random.key(7)
ESTIMATORS = {
    "hutchinson": hutchinson,
    "gauss_newton_bartlett": gauss_newton_bartlett,
}
every_estimator = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)


def dropped(x, key):
    return x * jax.random.bernoulli(key, 0.5, x.shape)


def logits_fn(params, batch):
    return dropped(batch["x"], batch["key"]) @ params["w"]


def obj_fn(params, batch):
    return jnp.mean(jnp.cosh(logits_fn(params, batch)))


def by_row(params, batch):
    return jax.vmap(lambda x, key: dropped(x, key) @ params["w"])(batch["x"], batch["key"])


WHOLE = {"obj_fn": obj_fn, "logits_fn": logits_fn, "inputs": {"x": X, "key": KEY}}
BY_ROW = {
    "obj_fn": lambda params, batch: jnp.mean(jnp.cosh(by_row(params, batch))),
    "logits_fn": by_row,
    "inputs": {"x": X, "key": jax.random.split(KEY, 16)},
}


def sample(estimator, key=0, **extra):
    return jit(lambda params: estimator(jax.random.key(key), params, None, **extra))(PARAMS)["w"]


@every_estimator
def test_without_groups_the_key_is_the_one_that_was_passed(make):
    closed = {
        "obj_fn": lambda params: obj_fn(params, WHOLE["inputs"]),
        "logits_fn": lambda params: logits_fn(params, WHOLE["inputs"]),
    }
    np.testing.assert_allclose(sample(make(), **WHOLE), sample(make(), **closed), rtol=1e-5)


@every_estimator
def test_groups_have_keys_of_their_own(make):
    """With one key for all of them, each group would drop the same units."""
    seen = []

    def record(key_data):
        seen.append(tuple(np.ravel(key_data)))

    def telling(function):
        def told(params, batch):
            jax.debug.callback(record, jax.random.key_data(batch["key"]))
            return function(params, batch)

        return told

    extra = WHOLE | {"obj_fn": telling(obj_fn), "logits_fn": telling(logits_fn)}
    assert np.isfinite(sample(make(groups=4), **extra)).all()
    jax.effects_barrier()
    assert len(set(seen)) == 4


@every_estimator
def test_a_key_for_each_row_goes_with_its_row(make):
    """A sample of every second row equals a sample of these rows alone."""
    half = {"x": X[::2], "key": BY_ROW["inputs"]["key"][::2]}
    numbers = {"row_numbers": jnp.arange(0, 16, 2)}
    ours = sample(make(groups=8, batch_fraction=0.5), **BY_ROW)
    by_hand = sample(make(groups=8), **(BY_ROW | {"inputs": half} | numbers))
    np.testing.assert_allclose(ours, by_hand, rtol=1e-5)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_keys_go_along_with_the_gradient(fraction):
    estimator = gauss_newton_bartlett(groups=4, batch_fraction=fraction)

    def both(params):
        return value_grad_and_hessian(estimator)(
            jax.random.key(0), params, loss_fn=lambda f, batch: jnp.cosh(f).mean(-1), **BY_ROW
        )

    loss, grads, h = jit(both)(PARAMS)
    expected, expected_grads = jax.value_and_grad(BY_ROW["obj_fn"])(PARAMS, BY_ROW["inputs"])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(grads["w"], expected_grads["w"], rtol=1e-4)
    np.testing.assert_allclose(h["w"], sample(estimator, **BY_ROW), rtol=1e-4)


@every_estimator
def test_a_key_without_a_type_is_refused_with_both_forms_that_work(make):
    inputs = {"x": X, "key": jax.random.PRNGKey(0)}
    with pytest.raises(ValueError, match=r"if it is typed \(`jax.random.key`\)"):
        sample(make(groups=4), **(WHOLE | {"inputs": inputs}))
