"""Trust regions for tests of `trust_region`, and updates of them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from paths import GRADS, cast, row

from sophia_optax import clip_by_ratio, floor, hessian_estimate, squared_gradient, trust_region

T, LR = 40, 0.1
G = row(GRADS, 0)
RULES = ("soaa", "tadam")
every_rule = pytest.mark.parametrize("rule", RULES)


def region(direction=None, learning_rate=LR, total_steps=T, **arguments):
    direction = optax.identity() if direction is None else direction
    return trust_region(direction, learning_rate, total_steps=total_steps, **arguments)


def ratio(gamma=0.5, b1=0.0, decay=0.0, debias=True):
    """By default m is the gradient and h its square."""
    return clip_by_ratio(
        optax.ema(b1, debias=debias, accumulator_dtype=None),
        hessian_estimate(squared_gradient(), decay=decay, update_interval=1),
        denominator=floor(gamma, 1e-3),
        clip_threshold=0.8,
    )


def updated(tx, g=G, radius=1.5, state=None, dtype="float32", **extra):
    """One update, compiled, at this radius."""
    g = cast(g, dtype)
    state = tx.init(g) if state is None else state
    if radius is not None:
        state = optax.tree.set(state, radius=jnp.full_like(optax.tree.get(state, "radius"), radius))
    return jax.jit(lambda g, state: tx.update(g, state, g, **extra))(g, state)


def scalars(state):
    return [float(getattr(state, n)) for n in ("radius", "loss", "mass", "predicted")]
