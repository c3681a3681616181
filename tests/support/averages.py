"""Weighted means over the whole history of a gradient, and the outputs of transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from paths import GRADS, PARAMS, STEPS, cast

B1, B2 = 0.9, 0.8
SHIFTED = {n: 1.5 + x for n, x in GRADS.items()}  # a mean that the centred moment must remove


def momentum(decay=B1):
    return optax.ema(decay, debias=True, accumulator_dtype=None)


def outputs(tx, grads, dtype="float64", told=lambda t: {}):
    """(the outputs of `tx` at every step, [STEPS, ...]; its last state)."""

    def step(state, xs):
        t, g = xs
        return tx.update(g, state, **told(t))[::-1]

    xs = jnp.arange(STEPS), cast(grads, dtype)
    state, out = jax.lax.scan(step, tx.init(cast(PARAMS, dtype)), xs)
    return out, state


def weights(decay, t):
    """Weights of the steps 1 to t in an average at t; they add up to 1 - decay^t."""
    return (1 - decay) * decay ** np.arange(t - 1, -1, -1)


def weighted_mean(x, decay, t):
    return np.tensordot(weights(decay, t), x[:t], 1) / (1 - decay**t)
