"""Layers: the parts of blocks, position schemes and heads.

Every class is a small NNX module that knows sizes and mesh-axis names, but no mesh. A parameter's
sharding is stated where it is made. The model-width dimension of each matrix is sharded over the
mesh axis `"fsdp"`; the other dimension (heads, feed-forward units or tokens) over `"tensor"`, as
are biases along it. Positions, token types and classes are too few to shard, and vectors along the
model width are replicated. Parameters are float32; a layer computes in the dtype of its input.

Dimensions: B batch, T time, D model width, F feed-forward width, V vocabulary with its padding,
C context.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3, for the sharding over `"tensor"`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

INIT_STDDEV = 0.02
PADDING_LOGIT = -1e9
"""Logit of a padding row: its probability is 0, and its square is finite."""


def _matrix(rngs: nnx.Rngs, shape: tuple[int, int], sharding, stddev: float = INIT_STDDEV):
    return _param(_normal(rngs, shape, stddev), sharding)


def _normal(rngs: nnx.Rngs, shape: tuple[int, int], stddev: float = INIT_STDDEV) -> jax.Array:
    return nnx.initializers.normal(stddev)(rngs.params(), shape, jnp.float32)


def _param(value: jax.Array, sharding: tuple[str | None, ...]) -> nnx.Param:
    # Eager sharding would need a mesh with our axis names just to draw the initial values.
    made = nnx.with_partitioning(lambda: value, sharding, eager_sharding=False)
    return nnx.Param(made())


def in_projection(
    rngs: nnx.Rngs, width: int, features: int, *, axis: str | None = "tensor"
) -> nnx.Param:
    """A float32[width, features] matrix out of the residual stream, N(0, 0.02)."""
    return _matrix(rngs, (width, features), ("fsdp", axis))


def out_projection(
    rngs: nnx.Rngs, features: int, width: int, *, stddev: float = INIT_STDDEV
) -> nnx.Param:
    """A float32[features, width] matrix into the residual stream, N(0, stddev)."""
    return _matrix(rngs, (features, width), ("tensor", "fsdp"), stddev)


def bias_vector(size: int, wanted: bool = True, *, axis: str | None = None) -> nnx.Param | None:
    """A float32[size] vector of zeros, sharded over a mesh axis if one is given; or None."""
    if not wanted:
        return None
    zeros = jnp.zeros(size, jnp.float32)
    return _param(zeros, (axis,)) if axis else nnx.Param(zeros)


def affine(x: jax.Array, matrix: nnx.Param, bias: nnx.Param | None = None) -> jax.Array:
    """`x @ matrix + bias` in the dtype of x."""
    y = x @ matrix[...].astype(x.dtype)
    return y if bias is None else y + bias[...].astype(x.dtype)


def tied_logits(x_xD: jax.Array, embedding_VxD: jax.Array) -> jax.Array:
    """Inner products with each embedding row: float32[..., V], multiplied in the dtype of x.

    For bfloat16 operands the dot algorithm is named, as in `jax.nn.dot_product_attention`: with
    float32 as the preferred type alone, the backward pass would multiply in float32.
    """
    bfloat16 = x_xD.dtype == jnp.bfloat16
    return jnp.einsum(
        "...D,VD->...V",
        x_xD,
        embedding_VxD.astype(x_xD.dtype),
        precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if bfloat16 else None,
        preferred_element_type=jnp.float32,
    )


def mask_padding(logits_xV: jax.Array, vocab_size: int) -> jax.Array:
    """Gives the padding rows of a vocabulary probability zero and no gradient."""
    padded = logits_xV.shape[-1]
    if padded == vocab_size:
        return logits_xV
    return jnp.where(jnp.arange(padded) < vocab_size, logits_xV, PADDING_LOGIT)


class Embedding(nnx.Module):
    """A table that embeds tokens or, transposed, computes logits; a tied model shares one table.

    Padding rows after the vocabulary, up to `padded` rows in all, are zeros that are never read.
    The initial values of the other rows do not depend on the padding.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        padded: int = 0,
        axis: str | None = "tensor",
        rngs: nnx.Rngs,
    ):
        self.vocab_size = vocab_size
        table = _normal(rngs, (vocab_size, width))
        rows = max(padded - vocab_size, 0)
        self.embedding = _param(jnp.pad(table, ((0, rows), (0, 0))), (axis, "fsdp"))

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """float32[B, T, D] rows; NaN for a token outside the vocabulary.

        The table is not cast before the lookup: its gradient is a scatter-add, and in bfloat16 the
        sum of thousands of terms for a frequent token would stall.
        """
        rows = self.embedding.shape[0]
        if rows > self.vocab_size:
            tokens_BxT = jnp.where(tokens_BxT < self.vocab_size, tokens_BxT, rows)
        return jnp.take(self.embedding[...], tokens_BxT, axis=0, mode="fill")

    def logits(self, x_xD: jax.Array) -> jax.Array:
        """float32[..., V]."""
        return mask_padding(tied_logits(x_xD, self.embedding[...]), self.vocab_size)

    def unembedding(self) -> tuple[jax.Array, jax.Array | None]:
        """The factors of the logits: float32[V, D], and a bias float32[V] if rows are padding."""
        table_VxD = self.embedding[...]
        return table_VxD, padding_bias(len(table_VxD), self.vocab_size)


def padding_bias(rows: int, vocab_size: int) -> jax.Array | None:
    """A bias that has the effect of `mask_padding`; None without padding."""
    if rows == vocab_size:
        return None
    return jnp.where(jnp.arange(rows) < vocab_size, 0.0, PADDING_LOGIT)


class LearnedPositions(nnx.Module):
    """A learned vector for each of the first C positions, added to the embeddings."""

    def __init__(self, context: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = _matrix(rngs, (context, width), (None, "fsdp"))

    def __call__(self, x_BxTxD: jax.Array, positions_BxT: jax.Array | None = None) -> jax.Array:
        if positions_BxT is None:
            return x_BxTxD + self.embedding[: x_BxTxD.shape[1]]
        return x_BxTxD + self.embedding[positions_BxT]


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the width, then a learned scale and an optional bias.

    Computed in float32.
    """

    def __init__(self, width: int, eps: float, *, bias: bool = False):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = bias_vector(width, bias)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x = x_BxTxD.astype(jnp.float32)
        centered = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centered).mean(axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(variance + self.eps) * self.scale[...]
        if self.bias is not None:
            normed = normed + self.bias[...]
        return normed.astype(x_BxTxD.dtype)


class RMSNorm(nnx.Module):
    """Unit root mean square over the last axis, then a learned scale; computed in float32.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x = x_BxTxD.astype(jnp.float32)
        square = jnp.square(x).mean(axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(square + self.eps) * self.scale[...]).astype(x_BxTxD.dtype)


class GeluMlp(nnx.Module):
    """Two matrices around a GELU: `approximate` by a tanh (GPT-2), or exact (BERT)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        out_stddev: float,
        bias: bool = False,
        approximate: bool = True,
        rngs: nnx.Rngs,
    ):
        self.approximate = approximate
        self.up = in_projection(rngs, width, hidden)
        self.down = out_projection(rngs, hidden, width, stddev=out_stddev)
        self.up_bias = bias_vector(hidden, bias, axis="tensor")
        self.down_bias = bias_vector(width, bias)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        up_BxTxF = affine(x_BxTxD, self.up, self.up_bias)
        hidden_BxTxF = jax.nn.gelu(up_BxTxF, approximate=self.approximate)
        return affine(hidden_BxTxF, self.down, self.down_bias)


class SwigluMlp(nnx.Module):
    """`down(silu(gate(x)) * up(x))`.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """

    def __init__(
        self, width: int, hidden: int, *, out_stddev: float, bias: bool = False, rngs: nnx.Rngs
    ):
        self.gate = in_projection(rngs, width, hidden)
        self.up = in_projection(rngs, width, hidden)
        self.down = out_projection(rngs, hidden, width, stddev=out_stddev)
        self.gate_bias = bias_vector(hidden, bias, axis="tensor")
        self.up_bias = bias_vector(hidden, bias, axis="tensor")
        self.down_bias = bias_vector(width, bias)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        gate_BxTxF = jax.nn.silu(affine(x_BxTxD, self.gate, self.gate_bias))
        return affine(
            gate_BxTxF * affine(x_BxTxD, self.up, self.up_bias), self.down, self.down_bias
        )
