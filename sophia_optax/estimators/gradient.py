"""Estimators that read only the gradient, without a pass over the model."""

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.estimators.base import Estimator, Sampler
from sophia_optax.numerics import widen

ArrayLike = jax.typing.ArrayLike


def squared_gradient(*, scale: float = 1.0) -> Estimator:
    """Empirical Fisher diagonal: the square of the incoming gradient.

        h = scale · g ⊙ g

    It is a biased estimate of any curvature, because its labels are the data's and not the model's.
    It serves as the baseline for `gauss_newton_bartlett`, and needs no extra argument.

    Args:
      scale: factor on g². With the number of outputs B, h is an estimate of the Fisher diagonal.

    Returns:
      An estimator, whose sample has the shapes of the gradient and is float32 or wider.

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
    """The curvature of Sophia-Lite: the magnitude of the incoming gradient.

        h = |g|

    h has the unit of a gradient, not of a curvature, so m / h has no unit, as in an Adam with the
    L1 norm. The estimator needs no extra argument.

    Returns:
      An estimator, whose sample has the shapes of the gradient and is float32 or wider.

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
    """The curvature of geometric SophiaG: g² weighted by the norm of the gradient.

        h = g ⊙ g / (1 + ‖g‖)

    ‖g‖ is the norm of the whole incoming tree, which takes one more pass over the gradient. The
    estimator needs no extra argument.

    Args:
      max_norm: bound on ‖g‖: g is first scaled down to it, as by `optax.clip_by_global_norm`. Set
        it here rather than chaining that transformation, which would compute the norm twice.

    Returns:
      An estimator, whose sample has the shapes of the gradient and is float32 or wider. It is NaN
      if ‖g‖ is not finite.

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
        checks.nonzero("max_norm", max_norm, "it stops all movement; None does not bound it.")

    def estimator(key, params, updates, **unused):
        del key, params, unused
        updates, norm = bounded(jax.tree.map(widen, updates), max_norm)
        weight = 1 / (1 + norm)
        # Not g² * weight: XLA would write g² to memory, because the norm reads it too.
        return jax.tree.map(lambda g: g * (g * weight.astype(g.dtype)), updates)

    return Sampler("weighted_squared_gradient", estimator)


def bounded(updates: optax.Updates, max_norm: ArrayLike | None) -> tuple[optax.Updates, jax.Array]:
    """(gradient scaled down to a norm of `max_norm`, its norm); NaN if the norm is not finite."""
    norm = optax.tree.norm(jax.tree.map(widen, updates))
    finite = jnp.isfinite(norm)  # an infinite norm would give h = 0, which would be accepted
    if max_norm is None:
        return updates, jnp.where(finite, norm, jnp.nan)
    bound = jnp.minimum(norm, jnp.asarray(max_norm, norm.dtype))
    factor = bound / jnp.where(norm == 0, 1, norm)
    scaled = jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)
    return scaled, jnp.where(finite, bound, jnp.nan)
