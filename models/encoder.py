"""The encoder: BERT, with a head for masked tokens or for classes."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Attention, separate
from models.config import EncoderConfig
from models.decoder import check_length
from models.depth import Constrain, identity, make_blocks, through_blocks
from models.layers import (
    INIT_STDDEV,
    Embedding,
    GeluMlp,
    LayerNorm,
    LearnedPositions,
    affine,
    bias_vector,
    in_projection,
    mask_padding,
    tied_logits,
)


class EncoderBlock(nnx.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)): float[B, T, D] to the same."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(
            config.width,
            config.heads,
            kv_heads=config.heads,
            head_width=config.head_width,
            scale=config.head_width**-0.5,
            out_stddev=INIT_STDDEV,
            causal=False,
            bias=True,
            implementation=config.attention,
            rngs=rngs,
        )
        self.attention_norm = LayerNorm(config.width, config.norm_eps, bias=True)
        self.mlp = GeluMlp(
            config.width,
            config.ffn_width or 4 * config.width,
            out_stddev=INIT_STDDEV,
            bias=True,
            approximate=False,
            rngs=rngs,
        )
        self.mlp_norm = LayerNorm(config.width, config.norm_eps, bias=True)

    def __call__(self, x_BxTxD: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x_BxTxD = self.attention_norm(x_BxTxD + self.attention(x_BxTxD, mask))
        return self.mlp_norm(x_BxTxD + self.mlp(x_BxTxD))


class MaskedTokenHead(nnx.Module):
    """A dense layer, then inner products with the token embeddings plus a bias per token."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.dense = in_projection(rngs, config.width, config.width)
        self.dense_bias = bias_vector(config.width, axis="tensor")
        self.norm = LayerNorm(config.width, config.norm_eps, bias=True)
        self.bias = bias_vector(config.padded_vocab, axis="tensor")

    def features(self, x_BxTxD: jax.Array) -> jax.Array:
        """float[B, T, D]."""
        hidden_BxTxD = jax.nn.gelu(affine(x_BxTxD, self.dense, self.dense_bias), approximate=False)
        return self.norm(hidden_BxTxD)

    def logits(self, x_xD: jax.Array, tokens: Embedding) -> jax.Array:
        """float32[..., V]."""
        assert self.bias is not None
        products = tied_logits(x_xD, tokens.embedding[...])
        return mask_padding(products + self.bias[...], tokens.vocab_size)

    def unembedding(self, tokens: Embedding) -> tuple[jax.Array, jax.Array | None]:
        """(float32[V, D], float32[V]): logits are `x @ matrix.T + bias`."""
        assert self.bias is not None
        table_VxD, padding = tokens.unembedding()
        return table_VxD, self.bias[...] if padding is None else self.bias[...] + padding


class ClassHead(nnx.Module):
    """A tanh layer on the first token (the pooler), then a linear layer in float32."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.dense = in_projection(rngs, config.width, config.width)
        self.dense_bias = bias_vector(config.width, axis="tensor")
        self.out = in_projection(rngs, config.width, config.classes, axis=None)
        self.out_bias = bias_vector(config.classes)

    def features(self, x_BxTxD: jax.Array) -> jax.Array:
        """float[B, D]."""
        return jnp.tanh(affine(x_BxTxD[:, 0], self.dense, self.dense_bias))

    def logits(self, x_xD: jax.Array, tokens: Embedding) -> jax.Array:
        """float32[..., classes]."""
        del tokens  # used by the other head
        return affine(x_xD.astype(jnp.float32), self.out, self.out_bias)

    def unembedding(self, tokens: Embedding) -> tuple[jax.Array, jax.Array | None]:
        """(float32[classes, D], float32[classes])."""
        del tokens
        assert self.out_bias is not None
        return self.out[...].T, self.out_bias[...]


class Encoder(nnx.Module):
    """Logits from tokens that all attend to each other.

    Configs that differ in the head alone share all other parameters, so a pretrained encoder is
    fine-tuned from `{**pretrained, "head": fresh["head"]}`.

    Args:
      config: shape, arithmetic and head.
      rngs: the source of the initial parameters, which are float32 and made without a mesh.

    >>> config = EncoderConfig(vocab_size=256, context=8, width=16, layers=2, heads=2)
    >>> Encoder(config, rngs=nnx.Rngs(0))(jnp.zeros((3, 8), int)).shape
    (3, 8, 256)
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tokens = Embedding(
            config.vocab_size, config.width, padded=config.padded_vocab, rngs=rngs
        )
        self.positions = LearnedPositions(config.context, config.width, rngs=rngs)
        self.types = Embedding(config.token_types, config.width, axis=None, rngs=rngs)
        self.norm = LayerNorm(config.width, config.norm_eps, bias=True)
        self.blocks = make_blocks(
            lambda: EncoderBlock(config, rngs=rngs), config.layers, scanned=config.scan_layers
        )
        head = ClassHead if config.classes else MaskedTokenHead
        self.head = head(config, rngs=rngs)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        constrain: Constrain = identity,
        segments_BxT: jax.Array | None = None,
        types_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of each token, or of each row's class.

        Args:
          tokens_BxT: int[B, T], T at most the context. A token of V or above gives NaN.
          constrain: applied to the residual stream; see `Decoder.__call__`.
          segments_BxT: int[B, T], the number of each token's sequence in a packed row, with another
            number for padding. A token attends to its own sequence only, and its position counts
            from the start of that sequence. Class logits are those of the first sequence.
          types_BxT: int[B, T], 0 for a first sentence and 1 for a second; default 0.

        Returns:
          float32[B, T, V], or float32[B, classes], whatever the compute dtype; V is
          `config.padded_vocab`.

        Raises:
          ValueError: if T exceeds the context.
        """
        return self.logits(self.features(tokens_BxT, constrain, segments_BxT, types_BxT))

    def features(
        self,
        tokens_BxT: jax.Array,
        constrain: Constrain = identity,
        segments_BxT: jax.Array | None = None,
        types_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """The input of the last matrix product; arguments as in `__call__`.

        Returns:
          float[B, T, D] after the dense layer and norm of the masked-token head, or float[B, D]
          after the pooler of the class head.
        """
        check_length(tokens_BxT, self.config.context)
        mask, places = separate(segments_BxT)
        types = jnp.zeros_like(tokens_BxT) if types_BxT is None else types_BxT
        x_BxTxD = self.positions(self.tokens(tokens_BxT) + self.types(types), places)
        x_BxTxD, _ = through_blocks(
            self.blocks,
            lambda block, x, _: (block(x, mask), None),
            constrain(self.norm(x_BxTxD).astype(self.config.dtype)),
            layers=self.config.layers,
            remat=self.config.remat,
            constrain=constrain,
        )
        return self.head.features(x_BxTxD)

    def logits(self, x_xD: jax.Array) -> jax.Array:
        """float32[..., V] or float32[..., classes] from the features of any number of positions."""
        return self.head.logits(x_xD, self.tokens)

    def unembedding(self) -> tuple[jax.Array, jax.Array | None]:
        """(float32[V, D], float32[V]): logits are `x @ matrix.T + bias`."""
        return self.head.unembedding(self.tokens)
