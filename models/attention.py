"""Self-attention: grouped heads, rotary positions, packed sequences.

Dimensions: B batch, T time, D model width, N heads, K key/value heads, H head width, S new tokens,
C positions of a cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import AttentionName
from models.layers import RMSNorm, affine, bias_vector, in_projection, out_projection


class Cache(NamedTuple):
    """Keys and values of earlier tokens: of all layers, or of one layer in `Attention`.

    >>> from models import DecoderConfig, cached
    >>> config = DecoderConfig(vocab_size=256, context=8, width=16, layers=2, heads=4, kv_heads=2)
    >>> cached(config).init(3).value.shape
    (2, 3, 8, 2, 4)
    """

    key: jax.Array  # float[layers, B, C, K, H], rotated
    value: jax.Array  # the same


class Attention(nnx.Module):
    """Multi-head self-attention in which N / K query heads share a key/value head.

    The softmax is in float32. `scale` multiplies the scores; `qk_norm_eps` normalises the queries
    and keys of each head, and `rope_theta` rotates them, unless it is None.
    `implementation="cudnn"` is faster on a GPU and has no second derivative; "xla" can be
    differentiated any number of times, in forward and reverse mode.

    Source: Ainslie et al. 2023, "GQA", section 2.2; normalised queries and keys as in the Qwen3
    technical report (2025), section 2.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int,
        head_width: int,
        scale: float,
        out_stddev: float,
        causal: bool = True,
        bias: bool = False,
        qk_norm_eps: float | None = None,
        rope_theta: float | None = None,
        implementation: AttentionName,
        rngs: nnx.Rngs,
    ):
        self.scale, self.causal, self.rope_theta = scale, causal, rope_theta
        self.head_width = head_width
        self.implementation: AttentionName = implementation
        self.query = in_projection(rngs, width, heads * head_width)
        self.key = in_projection(rngs, width, kv_heads * head_width)
        self.value = in_projection(rngs, width, kv_heads * head_width)
        self.out = out_projection(rngs, heads * head_width, width, stddev=out_stddev)
        self.query_bias = bias_vector(heads * head_width, bias, axis="tensor")
        self.key_bias = bias_vector(kv_heads * head_width, bias, axis="tensor")
        self.value_bias = bias_vector(kv_heads * head_width, bias, axis="tensor")
        self.out_bias = bias_vector(width, bias)
        self.query_norm = RMSNorm(head_width, qk_norm_eps) if qk_norm_eps else None
        self.key_norm = RMSNorm(head_width, qk_norm_eps) if qk_norm_eps else None

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_Bx1xTxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        depth: jax.Array | None = None,
    ) -> jax.Array:
        """float[B, T, D] to the same; `depth` divides the scores."""
        if positions_BxT is None:
            positions_BxT = jnp.arange(x_BxTxD.shape[1])[None]
        query_BxTxNxH, new = self._project(x_BxTxD, positions_BxT, depth)
        mixed_BxTxNxH = jax.nn.dot_product_attention(
            query_BxTxNxH,
            new.key,
            new.value,
            mask=mask_Bx1xTxT,
            scale=self.scale,
            is_causal=self.causal,
            implementation=self.implementation,
        )
        return affine(mixed_BxTxNxH.reshape(*x_BxTxD.shape[:-1], -1), self.out, self.out_bias)

    def extend(
        self,
        x_BxSxD: jax.Array,
        cache: Cache,
        positions_BxS: jax.Array,
        depth: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Attention for S more tokens of each row; tokens past the end of the cache are dropped."""
        query_BxSxNxH, new = self._project(x_BxSxD, positions_BxS, depth)
        rows_Bx1 = jnp.arange(x_BxSxD.shape[0])[:, None]
        places_C = jnp.arange(cache.key.shape[1])
        cache = jax.tree.map(
            lambda old, x: old.at[rows_Bx1, positions_BxS].set(x.astype(old.dtype), mode="drop"),
            cache,
            new,
        )
        mixed_BxSxNxH = jax.nn.dot_product_attention(
            query_BxSxNxH,
            cache.key.astype(query_BxSxNxH.dtype),
            cache.value.astype(query_BxSxNxH.dtype),
            mask=(places_C <= positions_BxS[..., None])[:, None],
            scale=self.scale,
            implementation="xla",  # cuDNN does not support this mask
        )
        return affine(
            mixed_BxSxNxH.reshape(*x_BxSxD.shape[:-1], -1), self.out, self.out_bias
        ), cache

    def _project(
        self, x_BxTxD: jax.Array, positions_BxT: jax.Array, depth: jax.Array | None
    ) -> tuple[jax.Array, Cache]:
        """The queries, and the keys and values, of these tokens."""
        query_BxTxNxH = self._heads(affine(x_BxTxD, self.query, self.query_bias))
        key_BxTxKxH = self._heads(affine(x_BxTxD, self.key, self.key_bias))
        value_BxTxKxH = self._heads(affine(x_BxTxD, self.value, self.value_bias))
        if self.query_norm is not None and self.key_norm is not None:
            query_BxTxNxH = self.query_norm(query_BxTxNxH)
            key_BxTxKxH = self.key_norm(key_BxTxKxH)
        if self.rope_theta is not None:
            query_BxTxNxH = rotate(query_BxTxNxH, positions_BxT, self.rope_theta)
            key_BxTxKxH = rotate(key_BxTxKxH, positions_BxT, self.rope_theta)
        if depth is not None:
            query_BxTxNxH = query_BxTxNxH / depth.astype(query_BxTxNxH.dtype)
        return query_BxTxNxH, Cache(key_BxTxKxH, value_BxTxKxH)

    def _heads(self, x_BxTxD: jax.Array) -> jax.Array:
        return x_BxTxD.reshape(*x_BxTxD.shape[:-1], -1, self.head_width)


def rotate(x_BxTxNxH: jax.Array, positions_BxT: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: rotates coordinates (i, i + H/2) by the angle position * theta^(-2i/H).

    The inner product of two rotated vectors depends only on the difference of their positions.
    Computed in float32: in bfloat16 an angle of 1000 has an error of 4.

    Source: Su et al. 2021, "RoFormer", equation 34, with coordinates paired as in the Hugging Face
    layout of Llama's weights.
    """
    half = x_BxTxNxH.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BxTx1xF = (positions_BxT.astype(jnp.float32)[..., None] * frequencies)[:, :, None, :]
    cos, sin = jnp.cos(angles_BxTx1xF), jnp.sin(angles_BxTx1xF)
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxNxH.dtype)


def separate(segments_BxT: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """The attention mask and the positions of packed sequences.

    Returns:
      (bool[B, 1, T, T], int32[B, T]): whether two tokens belong to one segment, and the position
      of each token in its segment. (None, None) without segments.

    >>> separate(jnp.array([[7, 7, 7, 2, 2, 0]]))[1]
    Array([[0, 1, 2, 0, 1, 0]], dtype=int32)
    """
    if segments_BxT is None:
        return None, None
    mask_BxTxT = segments_BxT[:, :, None] == segments_BxT[:, None, :]
    places_T = jnp.arange(segments_BxT.shape[1], dtype=jnp.int32)
    begins = jnp.diff(segments_BxT, axis=1, prepend=segments_BxT[:, :1]) != 0
    starts_BxT = jax.lax.cummax(jnp.where(begins, places_T, 0), axis=1)
    return mask_BxTxT[:, None], places_T - starts_BxT
