"""The optimizers that must keep the contract, and the small model that they are run on.

An optimizer joins `test_contract.py` and `test_wrappers.py` by a line in `OPTIMIZERS`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_optax import gauss_newton_bartlett, hutchinson, sophia_g, sophia_h

NUMBERS = {
    "learning_rate": 0.05,
    "b1": 0.9,
    "b2": 0.8,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "gamma": 0.5,
    "clip_threshold": 0.8,
    "update_interval": 3,
}
EXACT = {"rtol": 0, "atol": 0}


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """A factory of ours with its estimator; `NUMBERS` are the arguments that can be traced."""

    factory: Callable[..., Any]
    estimator: Any
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    static: tuple[str, ...] = ("estimator", "weight_decay_mask")
    # Where programs may round differently: bfloat16 turns one last bit into 2^-8.
    tolerance: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"rtol": 1e-5, "atol": 1e-6}
    )

    def __call__(self, factory=None, estimator=None, **changes):
        arguments = NUMBERS | self.arguments | changes
        return (factory or self.factory)(estimator=estimator or self.estimator, **arguments)

    @functools.cached_property
    def plain(self):
        """(parameters, state) after `STEPS` steps in float32, which wrapped runs must equal."""
        return jax.jit(lambda params: run(self(), params))(start())


SHORT = {"mu_dtype": "bfloat16", "hessian_dtype": "bfloat16"}
OPTIMIZERS = {
    "sophia_h": Optimizer(sophia_h, hutchinson()),
    "sophia_g": Optimizer(
        sophia_g, gauss_newton_bartlett(), {"debias_hessian": False, "statistics": False}
    ),
    "sophia_g, groups, bfloat16 state": Optimizer(
        sophia_g,
        gauss_newton_bartlett(groups=2),
        SHORT,
        tolerance={"rtol": 2e-2, "atol": 2e-3},
    ),
}
every_optimizer = pytest.mark.parametrize("opt", OPTIMIZERS.values(), ids=OPTIMIZERS)

STEPS = 10
ROWS, D, V = 8, 8, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, D)).astype(np.float32)
LABELS = rng.integers(V, size=ROWS)
PARAMS = {
    "w": rng.normal(size=(D, V)).astype(np.float32),
    "b": np.zeros(V, np.float32),
    "s": np.ones((), np.float32),
}
MIXED = {"w": "bfloat16", "b": "float32", "s": "float16"}


def start(dtype="float32"):
    dtypes = MIXED if dtype == "mixed" else dict.fromkeys(PARAMS, dtype)
    return {n: jnp.asarray(x, dtypes[n]) for n, x in PARAMS.items()}


def logits_fn(params, inputs):
    params = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, "float32")), params)
    return params["s"] * (inputs @ params["w"]) + params["b"]


def obj_fn(params, inputs):
    logits = logits_fn(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(LABELS)).mean()


EXTRA = {"obj_fn": obj_fn, "logits_fn": logits_fn, "inputs": X}


def step(tx, params, state, scale=1.0, **extra):
    """One update and its parameters; `scale` spoils the gradient."""
    grads = jax.tree.map(lambda g: scale * g, jax.grad(obj_fn)(params, extra.get("inputs", X)))
    updates, state = tx.update(grads, state, params, **(EXTRA | extra))
    return optax.apply_updates(params, updates), state


def run(tx, params, steps=STEPS, **extra):
    """The last parameters and state, in one scan: the carry must keep structure and dtypes."""

    def body(carry, _):
        return step(tx, *carry, **extra), None

    return jax.lax.scan(body, (params, tx.init(params)), length=steps)[0]


def assert_close(ours, expected, rtol=1e-6, atol=0.0):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=rtol, atol=atol)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def all_finite(tree):
    return all(jnp.isfinite(x).all() for x in jax.tree.leaves(tree))
