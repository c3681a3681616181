"""Momentum and curvature for tests of `clip_by_ratio`, and its updates on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax import clip_by_ratio, floor, hessian_estimate, shift, squared_gradient

RNG = np.random.default_rng(0)
M = {"a": RNG.normal(size=()), "b": RNG.normal(size=(4, 5)), "c": RNG.normal(size=(7,))}
H = {n: RNG.normal(0.5, 2.0, size=x.shape) for n, x in M.items()}
H["b"][1], H["c"][:3] = 0.0, -1.0  # rows without curvature, and concave ones


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def identity():
    return optax.GradientTransformation(lambda params: (), lambda u, s, p=None: (u, s))


def given_curvature(**arguments):
    """The sample itself: m is the gradient, h is `hessian=`."""
    return hessian_estimate(squared_gradient(), decay=0.0, bias_correction=False, **arguments)


def ratio(denominator, momentum=None, curvature=None, **arguments):
    momentum, curvature = momentum or identity(), curvature or given_curvature()
    return clip_by_ratio(momentum, curvature, denominator=denominator, **arguments)


def updated(tx, m=M, h=H, state=None, **extra):
    m = single(m)
    return tx.update(m, tx.init(m) if state is None else state, hessian=single(h), **extra)


DENOMINATORS = {
    "floor": (floor(0.5, 0.1), lambda h: np.maximum(0.5 * h, 0.1), 0.1),
    "shift": (shift(0.1, 0.5), lambda h: 0.5 * h + 0.1, 0.1),
}
V = {n: RNG.gamma(1.0, 0.3, size=x.shape) for n, x in M.items()}


def given_moment(v=V):
    return optax.stateless(lambda updates, params: single(v))


def program(tx, **static):
    g = single(M)

    def update(g, state, extra):
        return tx.update(g, state, **static, **extra)

    def text(**extra):
        return str(jax.make_jaxpr(update)(g, tx.init(g), extra))

    return text
