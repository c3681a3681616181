"""The layers of a model: what a block, a position scheme and a head are made of.

Every class is a small NNX module that knows sizes and a mesh-axis name, never a mesh. A
parameter's sharding is stated where it is made. The model-width dimension of each matrix is split
over the mesh axis `"fsdp"`; the other one, of heads, feed-forward units or tokens, over `"tensor"`,
as are the biases along it. Positions, token types and classes are too few to split, and vectors
along the model width are replicated. Parameters are float32; a layer computes in the dtype of its
input.

Dimensions: B batch, T time, D model width, F feed-forward width, V vocabulary with its padding,
C context.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3, for what is split over `"tensor"`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

INIT_STDDEV = 0.02
PADDING_LOGIT = -1e9
"""Logit of a row that pads the vocabulary: its probability is 0, and its square is finite."""


def _matrix(rngs: nnx.Rngs, shape: tuple[int, int], sharding, stddev: float = INIT_STDDEV):
    return _param(_normal(rngs, shape, stddev), sharding)


def _normal(rngs: nnx.Rngs, shape: tuple[int, int], stddev: float = INIT_STDDEV) -> jax.Array:
    return nnx.initializers.normal(stddev)(rngs.params(), shape, jnp.float32)


def _param(value: jax.Array, sharding: tuple[str | None, ...]) -> nnx.Param:
    # Eager sharding would demand a mesh whose axes are named like ours just to draw numbers.
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
    """A float32[size] vector that starts at zero, split over a mesh axis, or None."""
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

    With bfloat16 operands the algorithm is named, as in `jax.nn.dot_product_attention`: asking
    for float32 logits alone would make the backward pass multiply in float32.
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
    """Logits in which the rows that pad a vocabulary have no probability, and no gradient."""
    padded = logits_xV.shape[-1]
    if padded == vocab_size:
        return logits_xV
    return jnp.where(jnp.arange(padded) < vocab_size, logits_xV, PADDING_LOGIT)


class Embedding(nnx.Module):
    """A table that reads tokens or, transposed, writes logits; a tied model has one for both.

    Rows after the vocabulary, up to `padded` in all, are zeros that nothing reads: with any
    padding the others start the same.
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
        """float32[B, T, D] rows; NaN for a token that the vocabulary lacks.

        Not cast before the lookup: its gradient is a scatter-add, and sums of thousands of
        terms for a frequent token stall in bfloat16.
        """
        rows = self.embedding.shape[0]
        if rows > self.vocab_size:
            tokens_BxT = jnp.where(tokens_BxT < self.vocab_size, tokens_BxT, rows)
        return jnp.take(self.embedding[...], tokens_BxT, axis=0, mode="fill")

    def logits(self, x_xD: jax.Array) -> jax.Array:
        """float32[..., V]."""
        return mask_padding(tied_logits(x_xD, self.embedding[...]), self.vocab_size)

    def linear(self) -> tuple[jax.Array, jax.Array | None]:
        """Of which logits are made: float32[V, D], and float32[V] where rows are padding."""
        table_VxD = self.embedding[...]
        return table_VxD, padding_bias(len(table_VxD), self.vocab_size)


def padding_bias(rows: int, vocab_size: int) -> jax.Array | None:
    """What, added to logits, does as `mask_padding`; None where nothing is padded."""
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
    """Zero mean and unit variance over the width, then a learned scale and, if wanted, bias.

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
