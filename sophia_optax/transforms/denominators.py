"""Denominators of `clip_by_ratio`: functions of curvature h and the gradient's second moment v."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sophia_optax import checks

ArrayLike = jax.typing.ArrayLike
Denominator = Callable[[jax.Array, jax.Array], jax.Array]
"""A pure function of the leaves (h, v): curvature, and the second moment of the gradient."""


def floor(gamma: ArrayLike, eps: ArrayLike = 1e-12) -> Denominator:
    """The denominator of Sophia: max(gamma h, eps).

    Args:
      gamma: factor on h. A larger one clips fewer coordinates; 0 makes every step a sign step.
      eps: floor of the denominator. Where curvature is small or negative it applies, and after
        clipping a sign step is left. It is raised to the smallest normal float32 number.

    Returns:
      A pure function of (h, v) that ignores v.

    Raises:
      ValueError: an argument is negative.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 3, line 13.

    >>> import jax.numpy as jnp
    >>> print(floor(.5, .25)(jnp.array([4., 0., -4.])))
    [2.   0.25 0.25]
    """
    checks.in_range("gamma", gamma, 0, float("inf"), open_high=True)
    checks.in_range("eps", eps, 0, float("inf"), open_high=True)

    def denominator(h, v=None):
        del v
        return jnp.maximum(jnp.asarray(gamma, h.dtype) * h, _normal(eps, h.dtype))

    return denominator


def shift(eps: ArrayLike, rho: ArrayLike = 1.0) -> Denominator:
    """The denominator rho h + eps, for curvature that is never negative.

    Args:
      eps: shift; it is raised to the smallest normal float32 number.
      rho: factor on h.

    Returns:
      A pure function of (h, v) that ignores v.

    Raises:
      ValueError: an argument is negative.

    Source: the updates of Sophia-Lite and of geometric SophiaG, m / (h + eps).

    >>> import jax.numpy as jnp
    >>> print(shift(.5)(jnp.array([2., 0.])))
    [2.5 0.5]
    """
    checks.in_range("rho", rho, 0, float("inf"), open_high=True)
    checks.in_range("eps", eps, 0, float("inf"), open_high=True)

    def denominator(h, v=None):
        del v
        return jnp.asarray(rho, h.dtype) * h + _normal(eps, h.dtype)

    return denominator


def rms_floor(gamma: ArrayLike = 1.0, eps: ArrayLike = 1e-8) -> Denominator:
    """The denominator max(gamma h, sqrt(v)) + eps: Adam's where curvature is small.

    Where `floor` leaves a sign step, this denominator leaves Adam's step m / sqrt(v).

    Args:
      gamma: factor on h; 0 gives Adam's denominator everywhere.
      eps: shift; it is raised to the smallest normal float32 number.

    Returns:
      A pure function of (h, v). v is the output of `clip_by_ratio`'s `second_moment`; without one
      it is h itself, as in SOAA.

    Raises:
      ValueError: an argument is negative.

    Source: SOAA, algorithm 1, lines 9 and 10, with any curvature in place of its F.

    >>> import jax.numpy as jnp
    >>> print(rms_floor(.5, .25)(jnp.array([8., 2., -4.]), jnp.array([4., 4., 4.])))
    [4.25 2.25 2.25]
    """
    checks.in_range("gamma", gamma, 0, float("inf"), open_high=True)
    checks.in_range("eps", eps, 0, float("inf"), open_high=True)

    def denominator(h, v):
        largest = jnp.maximum(jnp.asarray(gamma, h.dtype) * h, jnp.sqrt(v).astype(h.dtype))
        return largest + _normal(eps, h.dtype)

    return denominator


def _normal(eps: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """`eps`, raised to the smallest normal float32: smaller numbers may be flushed to zero."""
    return jnp.maximum(jnp.asarray(eps, dtype), jnp.asarray(jnp.finfo(jnp.float32).tiny, dtype))
