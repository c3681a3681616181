"""Inverse square roots of many small matrices, by matrix products: batched eigh hangs on CPU."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax.numerics import widen

ArrayLike = jax.typing.ArrayLike


def inverse_square_root(C: jax.Array, ridge: ArrayLike) -> jax.Array:
    r"""(C + ridge I)^(-1/2) of symmetric positive semidefinite matrices, by matrix products.

        Y, Z, l <- A, I, sqrt(ridge / s)       A = (C + ridge I) / s, s = ‖C‖_F + ridge
        T = ρ/2 (3 I - ρ² Z Y)                 ρ = sqrt(3 / (1 + l + l²))
        Y, Z <- Y T, T Z                       to A^(1/2), A^(-1/2)
        l <- ρ/2 l (3 - ρ² l²)                 bounds the spectrum of Y: [l, 1], to 1

    Args:
      C: float[..., b, b].
      ridge: float[...] or a number, >= 0. It is raised to 4 b ulp ‖C‖_F, the size of rounding
        errors in C (6e-5 ‖C‖_F for b = 128 in float32), and to the smallest normal number, so that
        the root of 0 is finite.

    Returns:
      [..., b, b] in float32 at least. The number of steps depends only on b and the dtype: 9 for
      b = 128 in float32, 20 in float64.

    Source: Chen and Chow 2014, "A stable scaling of Newton-Schulz for improving the sign function
    computation of a Hermitian matrix"; coupled as in Higham 2008, "Functions of Matrices", 6.3.

    >>> import jax.numpy as jnp
    >>> print(inverse_square_root(jnp.diag(jnp.array([4., .25])), 0.).round(3))
    [[0.5 0. ]
     [0.  2. ]]
    """
    C = widen(jnp.asarray(C))
    norm = frobenius_norm(C)
    ridge = floored(jnp.asarray(ridge, C.dtype)[..., None, None], norm, C.shape[-1])
    scale = norm + ridge
    return normalised_root(C, ridge, scale) * jax.lax.rsqrt(scale)


def normalised_root(C: jax.Array, ridge: jax.Array, scale: jax.Array) -> jax.Array:
    """((C + ridge I) / scale)^(-1/2), for eigenvalues in [ridge / scale, 1]."""
    eye = identity_like(C)

    def step(_, carry):
        Y, Z, l = carry
        rho = _rho(l, jnp.sqrt)
        T = rho / 2 * (3 * eye - rho * rho * matmul(Z, Y))
        return matmul(Y, T), matmul(T, Z), _lift(l, rho)

    Y = (C + ridge * eye) / scale
    carry = (Y, eye, jnp.sqrt(ridge / scale))
    return jax.lax.fori_loop(0, _steps(C.shape[-1], C.dtype), step, carry)[1]


def identity_like(C: jax.Array) -> jax.Array:
    """[..., b, b] identity matrices, sharded like C because they are added to zeros of it."""
    return jnp.zeros_like(C) + jnp.broadcast_to(jnp.eye(C.shape[-1], dtype=C.dtype), C.shape)


def _rho(l: Any, sqrt: Callable[[Any], Any]) -> Any:
    return sqrt(3 / (1 + l + l * l))


def _lift(l: Any, rho: Any) -> Any:
    return rho * l * (3 - rho * rho * l * l) / 2


def _steps(b: int, dtype: jnp.dtype) -> int:
    """How many steps raise the smallest l that the floor of the ridge admits to 1."""
    floor, steps = _relative_floor(b, dtype), 0
    l = math.sqrt(floor / (1 + floor))
    while 1 - l > float(jnp.finfo(dtype).eps):
        l, steps = _lift(l, _rho(l, math.sqrt)), steps + 1
    return steps


def _relative_floor(b: int, dtype: jnp.dtype) -> float:
    """Eigenvalues of C below this share of ‖C‖_F are rounding errors of either sign."""
    return 4 * b * float(jnp.finfo(dtype).eps)


def floored(ridge: jax.Array, norm: jax.Array, b: int) -> jax.Array:
    """The ridge, raised to the size of rounding errors and to the smallest normal number."""
    floor = _relative_floor(b, norm.dtype) * norm
    return jnp.maximum(jnp.maximum(ridge, floor), jnp.finfo(norm.dtype).tiny)


def frobenius_norm(C: jax.Array) -> jax.Array:
    """[..., b, b] -> [..., 1, 1]; scaled first, as squares of curvature may over- or underflow."""
    largest = jnp.max(jnp.abs(C), axis=(-2, -1), keepdims=True)
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(jnp.sum(jnp.square(C / unit), axis=(-2, -1), keepdims=True))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")  # GPUs and TPUs round operands by default
