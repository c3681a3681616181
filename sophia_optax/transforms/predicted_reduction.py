"""How much a step is predicted to reduce the loss: what a direction tells `trust_region`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class PredictedReduction(NamedTuple):
    """The model of the loss along a step u, left by a direction for an enclosing `trust_region`.

    `trust_region` passes its radius to the direction inside as the extra argument `radius`. A
    direction that takes the radius into its own step keeps a `PredictedReduction` anywhere in its
    state and refreshes it in each update. `trust_region` adds up all that it finds in the state of
    the direction. If it finds none, it multiplies the direction by the radius itself. Scalars are
    float32, or float64 where a parameter is; both are 0 before the first update.

    >>> import jax.numpy as jnp, optax
    >>> from sophia_optax import trust_region
    >>> def update(updates, state, params=None, *, radius, **unused):
    ...     step = radius * jnp.sign(updates)              # a sign step of length r
    ...     return step, PredictedReduction(jnp.sum(updates * step), jnp.zeros([]))
    >>> def init(params):
    ...     return PredictedReduction(jnp.zeros([]), jnp.zeros([]))
    >>> sign = optax.GradientTransformationExtraArgs(init, update)
    >>> tx = trust_region(sign, .1, total_steps=100)
    >>> g = jnp.array([1., -4.])
    >>> _, state = tx.update(g, tx.init(g), value=3.)
    >>> print(state.predicted)                             # lr Σ |g|
    0.5
    """

    linear: jax.Array  # (): Σ m u, the first-order reduction by u per unit of learning rate
    quadratic: jax.Array  # (): Σ h u², the curvature along u


def inner_product(x: optax.Updates, y: optax.Updates, dtype: jnp.dtype) -> jax.Array:
    """Σ x y over the tree, accumulated in `dtype`."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y, dtype=dtype), x, y)
    return jax.tree.reduce(jnp.add, products, jnp.zeros([], dtype))


def predict(
    step: optax.Updates, m: optax.Updates, h: optax.Updates, dtype: jnp.dtype
) -> PredictedReduction:
    """The prediction for a step, from momentum and curvature."""
    square = jax.tree.map(jnp.square, step)
    return PredictedReduction(inner_product(m, step, dtype), inner_product(h, square, dtype))


def total_prediction(state: Any) -> PredictedReduction | None:
    """The sum of all predictions in the state of a direction, or None if it holds none."""

    def is_prediction(node):
        return isinstance(node, PredictedReduction)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_prediction) if is_prediction(x)]
    return PredictedReduction(*jnp.sum(jnp.array(found), axis=0)) if found else None
