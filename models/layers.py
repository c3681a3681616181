"""The layers of a decoder: what a block, a position scheme and a head are made of.

Every class is a small NNX module that knows sizes and a mesh-axis name, never a mesh. A
parameter's sharding is stated where it is made: the model-width dimension of each matrix is
split over the mesh axis `"fsdp"`, vectors are replicated. Parameters are float32; a layer
computes in the dtype of its input.

Dimensions: B batch, T time, D model width, F feed-forward width, N heads, H head width, V
vocabulary, C context.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

INIT_STDDEV = 0.02
NORM_EPS = 1e-5


def _matrix(rngs: nnx.Rngs, shape: tuple[int, int], sharding, stddev: float = INIT_STDDEV):
    # Eager sharding would demand a mesh whose axes are named like ours just to draw numbers.
    initializer = nnx.with_partitioning(
        nnx.initializers.normal(stddev), sharding, eager_sharding=False
    )
    return nnx.Param(initializer(rngs.params(), shape, jnp.float32))


def in_projection(rngs: nnx.Rngs, width: int, features: int) -> nnx.Param:
    """A float32[width, features] matrix out of the residual stream, N(0, 0.02)."""
    return _matrix(rngs, (width, features), ("fsdp", None))


def out_projection(rngs: nnx.Rngs, features: int, width: int, *, stddev: float) -> nnx.Param:
    """A float32[features, width] matrix into the residual stream, N(0, stddev)."""
    return _matrix(rngs, (features, width), (None, "fsdp"), stddev)


def apply_matrix(x: jax.Array, matrix: nnx.Param) -> jax.Array:
    """`x @ matrix` in the dtype of x."""
    return x @ matrix[...].astype(x.dtype)


def tied_logits(x_BxTxD: jax.Array, embedding_VxD: jax.Array) -> jax.Array:
    """Inner products with each embedding row: float32[B, T, V], multiplied in the dtype of x.

    With bfloat16 operands the algorithm is named, as in `jax.nn.dot_product_attention`: asking
    for float32 logits alone would make the backward pass multiply in float32.
    """
    bfloat16 = x_BxTxD.dtype == jnp.bfloat16
    return jnp.einsum(
        "BTD,VD->BTV",
        x_BxTxD,
        embedding_VxD.astype(x_BxTxD.dtype),
        precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if bfloat16 else None,
        preferred_element_type=jnp.float32,
    )


class TiedEmbedding(nnx.Module):
    """One table that reads tokens and, transposed, writes logits."""

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = _matrix(rngs, (vocab_size, width), (None, "fsdp"))

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """float32[B, T, D] rows; NaN for a token of V or above.

        Not cast before the lookup: its gradient is a scatter-add, and sums of thousands of
        terms for a frequent token stall in bfloat16.
        """
        return jnp.take(self.embedding[...], tokens_BxT, axis=0, mode="fill")

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """float32[B, T, V]."""
        return tied_logits(x_BxTxD, self.embedding[...])


class LearnedPositions(nnx.Module):
    """A learned vector for each of the first C positions, added to the embeddings."""

    def __init__(self, context: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = _matrix(rngs, (context, width), (None, "fsdp"))

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return x_BxTxD + self.embedding[: x_BxTxD.shape[1]]


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the width, then a learned scale; computed in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x = x_BxTxD.astype(jnp.float32)
        centered = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centered).mean(axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(variance + NORM_EPS) * self.scale[...]
        return normed.astype(x_BxTxD.dtype)


class Attention(nnx.Module):
    """Causal multi-head self-attention, without biases; the softmax is in float32.

    `scale` multiplies the scores. `implementation="cudnn"` is faster on a GPU and has no second
    derivative; "xla" may be differentiated any number of times, in either mode.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        scale: float,
        out_stddev: float,
        implementation: Literal["xla", "cudnn"],
        rngs: nnx.Rngs,
    ):
        self.heads, self.scale = heads, scale
        self.implementation: Literal["xla", "cudnn"] = implementation
        self.query = in_projection(rngs, width, width)
        self.key = in_projection(rngs, width, width)
        self.value = in_projection(rngs, width, width)
        self.out = out_projection(rngs, width, width, stddev=out_stddev)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        projections = (self.query, self.key, self.value)
        heads = [self._heads(apply_matrix(x_BxTxD, matrix)) for matrix in projections]
        mixed_BxTxNxH = jax.nn.dot_product_attention(
            *heads, scale=self.scale, is_causal=True, implementation=self.implementation
        )
        return apply_matrix(mixed_BxTxNxH.reshape(x_BxTxD.shape), self.out)

    def _heads(self, x_BxTxD: jax.Array) -> jax.Array:
        return x_BxTxD.reshape(*x_BxTxD.shape[:-1], self.heads, -1)


class GeluMlp(nnx.Module):
    """Two matrices around a tanh GELU, without biases."""

    def __init__(self, width: int, hidden: int, *, out_stddev: float, rngs: nnx.Rngs):
        self.up = in_projection(rngs, width, hidden)
        self.down = out_projection(rngs, hidden, width, stddev=out_stddev)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        hidden_BxTxF = jax.nn.gelu(apply_matrix(x_BxTxD, self.up), approximate=True)
        return apply_matrix(hidden_BxTxF, self.down)
