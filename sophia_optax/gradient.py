"""Estimators that read nothing but the gradient: they cost no pass over the model."""

import jax
import jax.numpy as jnp
import optax

from sophia_optax.curvature import Estimator, widen


def squared_gradient(*, scale: float = 1.0) -> Estimator:
    """Empirical Fisher diagonal h = scale · g ⊙ g, of the incoming gradient.

    Biased for every curvature (labels are the data's, not the model's); the baseline that
    Gauss-Newton-Bartlett is compared with. Needs no extra argument.

    Args:
      scale: factor on g²; the number of outputs B makes it an estimate of the Fisher diagonal.

    Returns:
      An estimator.

    Source: Liu et al. 2023 (arXiv 2305.14342), the ablation "E-F".

    >>> import jax, jax.numpy as jnp
    >>> print(squared_gradient()(jax.random.key(0), None, jnp.array([1., -2.])))
    [1. 4.]
    """

    def estimator(key, params, updates, **unused):
        del key, params, unused
        return jax.tree.map(lambda g: scale * jnp.square(widen(g)), updates)

    return estimator


def gradient_magnitude() -> Estimator:
    """The curvature of Sophia-Lite, h = |g|, of the incoming gradient. Needs no extra argument.

    It is no curvature: it has the unit of a gradient, so m / h is a step without a unit, as in
    an L1 Adam.

    Returns:
      An estimator.

    Source: Sophia-Lite, equation 2.

    >>> import jax, jax.numpy as jnp
    >>> print(gradient_magnitude()(jax.random.key(0), None, jnp.array([1., -2.])))
    [1. 2.]
    """

    def estimator(key, params, updates, **unused):
        del key, params, unused
        return jax.tree.map(lambda g: jnp.abs(widen(g)), updates)

    return estimator


def weighted_squared_gradient() -> Estimator:
    """The curvature of geometric SophiaG, h = g² / (1 + ‖g‖). Needs no extra argument.

    The norm is that of the whole incoming tree, so it is a pass over the gradient of its own.

    Returns:
      An estimator.

    Source: geometric SophiaG, equation 1.

    >>> import jax, jax.numpy as jnp
    >>> print(weighted_squared_gradient()(jax.random.key(0), None, jnp.array([3., -4.])))
    [1.5       2.6666667]
    """

    def estimator(key, params, updates, **unused):
        del key, params, unused
        updates = jax.tree.map(widen, updates)
        norm = optax.tree.norm(updates)
        norm = jnp.where(jnp.isfinite(norm), norm, jnp.nan)  # over inf all would be 0, and taken
        return jax.tree.map(lambda g: jnp.square(g) / (1 + norm).astype(g.dtype), updates)

    return estimator
