"""In which dtype numbers are summed, stored and passed on."""

import jax
import jax.numpy as jnp
import optax


def accumulation_dtype(x: jax.typing.ArrayLike) -> jnp.dtype:
    """float32 at least, float64 where `x` is."""
    with jax.numpy_dtype_promotion("standard"):  # else bfloat16 has no answer in strict mode
        return jnp.promote_types(jnp.result_type(x), jnp.float32)


def widen(x: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(x, accumulation_dtype(x))


def widest(params: optax.Params) -> jnp.dtype:
    """The dtype of scalars that sum over the tree: float32, or float64 where some leaf is."""
    dtypes = [jnp.dtype(jnp.float32), *map(accumulation_dtype, jax.tree.leaves(params))]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def cast_to_step(
    step: optax.Updates, updates: optax.Updates, params: optax.Params | None
) -> optax.Updates:
    """The dtype of the gradient, or of the parameter where that is wider.

    A bfloat16 gradient of a float32 parameter must not cut the step to 8 bits.
    """

    def cast(u, g, p):
        with jax.numpy_dtype_promotion("standard"):
            return u.astype(jnp.promote_types(jnp.result_type(g), jnp.result_type(p)))

    return jax.tree.map(cast, step, updates, updates if params is None else params)
