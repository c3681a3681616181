"""The dtypes in which numbers are summed, stored and returned."""

import jax
import jax.numpy as jnp
import optax


def accumulation_dtype(x: jax.typing.ArrayLike) -> jnp.dtype:
    """The dtype in which `x` is accumulated: float32, or float64 if `x` is float64."""
    with jax.numpy_dtype_promotion("standard"):  # strict mode cannot promote bfloat16
        return jnp.promote_types(jnp.result_type(x), jnp.float32)


def widen(x: jax.typing.ArrayLike) -> jax.Array:
    """Casts `x` to its accumulation dtype."""
    return jnp.asarray(x, accumulation_dtype(x))


def widest(params: optax.Params) -> jnp.dtype:
    """The dtype of sums over the whole tree: float32, or float64 if some leaf is float64."""
    dtypes = [jnp.dtype(jnp.float32), *map(accumulation_dtype, jax.tree.leaves(params))]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def cast_to_step(
    step: optax.Updates, updates: optax.Updates, params: optax.Params | None
) -> optax.Updates:
    """Casts the step to the dtype of the gradient, or of the parameter if that is wider.

    A bfloat16 gradient of a float32 parameter must not round the step to 8 bits.
    """

    def cast(u, g, p):
        with jax.numpy_dtype_promotion("standard"):
            return u.astype(jnp.promote_types(jnp.result_type(g), jnp.result_type(p)))

    return jax.tree.map(cast, step, updates, updates if params is None else params)


def decayed(decay: jax.typing.ArrayLike, x: jax.Array, average: jax.Array) -> jax.Array:
    """The moving average after x, in the dtype of x."""
    d = jnp.asarray(decay, x.dtype)
    return d * average.astype(x.dtype) + (1 - d) * x


def is_fixed_at_one(interval: jax.typing.ArrayLike) -> bool:
    """Whether an interval is 1 by its Python or NumPy value; that of a JAX array is not known."""
    return not isinstance(interval, jax.Array) and bool(interval == 1)
