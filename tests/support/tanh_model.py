"""A small tanh network with all arguments of the estimators; its oracle is `exact.ExactTanh`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from moments import jit

from sophia_optax.estimators.value_and_grad import value_grad_and_hessian

ROWS, TOKENS, D, K, V = 8, 2, 2, 3, 3
KEY = jax.random.key(3)
rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, TOKENS, D))
Y = {
    "categorical": rng.integers(V, size=(ROWS, TOKENS)),
    "bernoulli": rng.integers(2, size=(ROWS, TOKENS, V)),
    "gaussian": rng.normal(size=(ROWS, TOKENS, V)),
}
# Fractional weights and padding, unequal in every grouping; the last quarter of the rows has none.
W = np.array([[1, 0.3], [2, 0], [1, 1], [0.5, 0.1], [0, 0.2], [1, 0], [0, 0], [0, 0]])
PARAMS = {
    name: rng.normal(size=shape)
    for name, shape in {"w1": (D, K), "b1": (K,), "w2": (K, V), "b2": (V,)}.items()
}
LOSSES = {
    "categorical": optax.softmax_cross_entropy_with_integer_labels,
    "bernoulli": lambda f, y: optax.sigmoid_binary_cross_entropy(f, y.astype(f.dtype)),
    "gaussian": lambda f, y: jnp.sum(optax.l2_loss(f, y), -1),
}


def weights_of(likelihood):
    return np.repeat(W[..., None], V, -1) * [1, 0.5, 0.25] if likelihood == "bernoulli" else W


def logits_fn(params, batch):
    return jnp.tanh(batch["x"] @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_fn(outputs, batch, likelihood="categorical"):
    return LOSSES[likelihood](outputs, batch["y"])


def obj_fn(params, batch, likelihood="categorical"):
    losses = loss_fn(logits_fn(params, batch), batch, likelihood)
    weights = batch.get("w", jnp.ones_like(losses))
    return jnp.sum(weights * losses) / jnp.sum(weights)


def arguments(likelihood="categorical", weighted=False, dtype="float64"):
    """(params, extra arguments of every estimator)."""
    cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
    batch = {"x": cast(X), "y": jnp.asarray(Y[likelihood])}
    weights = cast(weights_of(likelihood)) if weighted else None
    extra = {
        "logits_fn": logits_fn,
        "loss_fn": functools.partial(loss_fn, likelihood=likelihood),
        "obj_fn": functools.partial(obj_fn, likelihood=likelihood),
        "inputs": batch | ({"w": weights} if weighted else {}),
    }
    return cast(PARAMS), extra | ({"weights": weights} if weighted else {})


@jax.custom_vjp
def _tanh(x):
    return jnp.tanh(x)


@jax.custom_vjp
def tanh_squared(x):
    """tanh(x)² with a nested `custom_vjp`, which JAX cannot differentiate in forward mode."""
    return _tanh(x) ** 2


_tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g / jnp.cosh(x) ** 2,))
tanh_squared.defvjp(
    lambda x: (_tanh(x) ** 2, x), lambda x, g: (2 * g * _tanh(x) / jnp.cosh(x) ** 2,)
)


def shared(estimate, params, extra, key=KEY, **more):
    function = value_grad_and_hessian(estimate, **more)
    return jit(lambda key, params: function(key, params, **extra))(key, params)


def close(have, want, rtol=1e-10, atol=1e-12):
    assert jax.tree.structure(have) == jax.tree.structure(want)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), have, want)
