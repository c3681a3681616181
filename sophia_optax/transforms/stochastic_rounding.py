"""Casts to bfloat16 that keep the mean, so that slow averages do not stall."""

import jax
import jax.numpy as jnp
import optax


def round_to(like: optax.Updates, tree: optax.Updates, key: jax.Array) -> optax.Updates:
    """Casts `tree` to the dtypes of `like`; casts to bfloat16 are rounded stochastically.

    A number that bfloat16 can represent keeps its value to the bit.
    """
    leaves, structure = jax.tree.flatten(tree)
    seeds = structure.unflatten(list(jax.random.bits(key, (len(leaves),), jnp.uint32)))

    def cast(seed, x, like):
        if like.dtype != jnp.bfloat16:
            return x.astype(like.dtype)
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        rounded = (bits + noise(seed, x.shape)) & jnp.uint32(0xFFFF0000)
        return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(jnp.bfloat16)

    return jax.tree.map(cast, seeds, tree, like)


def noise(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 numbers below 2^16, each a hash of its index and the seed.

    `jax.random.bits` would be a loop of its own on CPU and write an array: 13 bytes a parameter.
    """
    x = jnp.uint32(0)
    for axis, n in enumerate(shape):
        x = x * jnp.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = x + seed
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x >> 16
