"""Estimators that read nothing but the gradient: they cost no pass over the model."""

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.estimators.base import Estimator, Sampler
from sophia_optax.numerics import widen

ArrayLike = jax.typing.ArrayLike


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

    return Sampler("squared_gradient", estimator)


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

    return Sampler("gradient_magnitude", estimator)


def weighted_squared_gradient(*, max_norm: ArrayLike | None = None) -> Estimator:
    """The curvature of geometric SophiaG, h = g² / (1 + ‖g‖). Needs no extra argument.

    The norm is that of the whole incoming tree, so it is a pass over the gradient of its own.

    Args:
      max_norm: bound on ‖g‖: that of g scaled down to it, as by `optax.clip_by_global_norm`, is
        the curvature. Both norms are one here: behind such a clip the norm would be taken again.

    Returns:
      An estimator.

    Raises:
      ValueError: `max_norm` is not above 0.

    Source: geometric SophiaG, equation 1; the bound is ours.

    >>> import jax, jax.numpy as jnp
    >>> g = jnp.array([3., -4.])
    >>> print(weighted_squared_gradient()(jax.random.key(0), None, g))
    [1.5       2.6666667]
    >>> print(weighted_squared_gradient(max_norm=5.)(jax.random.key(0), None, 4 * g))
    [1.5       2.6666667]
    """
    if max_norm is not None:
        checks.in_range("max_norm", max_norm, 0, float("inf"))
        checks.nonzero("max_norm", max_norm, "it stops all movement; None leaves the gradient.")

    def estimator(key, params, updates, **unused):
        del key, params, unused
        updates, norm = bounded(jax.tree.map(widen, updates), max_norm)
        weight = 1 / (1 + norm)
        # Not g² times it: shared with the norm, g² would be written to memory.
        return jax.tree.map(lambda g: g * (g * weight.astype(g.dtype)), updates)

    return Sampler("weighted_squared_gradient", estimator)


def bounded(updates: optax.Updates, max_norm: ArrayLike | None) -> tuple[optax.Updates, jax.Array]:
    """The gradient, scaled down to a norm of `max_norm`, and its norm, NaN if it was not finite."""
    norm = optax.tree.norm(jax.tree.map(widen, updates))
    finite = jnp.isfinite(norm)  # over a norm of inf all curvature would be 0, and taken
    if max_norm is None:
        return updates, jnp.where(finite, norm, jnp.nan)
    bound = jnp.minimum(norm, jnp.asarray(max_norm, norm.dtype))
    factor = bound / jnp.where(norm == 0, 1, norm)
    scaled = jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)
    return scaled, jnp.where(finite, bound, jnp.nan)
