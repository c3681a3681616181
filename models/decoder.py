"""The decoder: one NNX module for every decoder config."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Attention, Cache, separate
from models.config import DecoderConfig
from models.depth import Constrain, identity, make_blocks, through_blocks
from models.layers import (
    INIT_STDDEV,
    Embedding,
    GeluMlp,
    LayerNorm,
    LearnedPositions,
    RMSNorm,
    SwigluMlp,
)


def _norm(config: DecoderConfig) -> LayerNorm | RMSNorm:
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, config.norm_eps)
    return LayerNorm(config.width, config.norm_eps, bias=config.bias)


def _table(config: DecoderConfig, rngs: nnx.Rngs) -> Embedding:
    return Embedding(config.vocab_size, config.width, padded=config.padded_vocab, rngs=rngs)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): float[B, T, D] to the same."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        out_stddev = INIT_STDDEV / (2 * config.layers) ** 0.5
        self.attention_norm = _norm(config)
        self.attention = Attention(
            config.width,
            config.heads,
            kv_heads=config.kv_heads or config.heads,
            head_width=config.head_width,
            scale=config.head_width**-0.5,
            out_stddev=out_stddev,
            bias=config.bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            rope_theta=config.rope_theta if config.positions == "rope" else None,
            implementation=config.attention,
            rngs=rngs,
        )
        self.mlp_norm = _norm(config)
        mlp = {"gelu": GeluMlp, "swiglu": SwigluMlp}[config.mlp]
        hidden = config.ffn_width or 4 * config.width
        self.mlp = mlp(config.width, hidden, out_stddev=out_stddev, bias=config.bias, rngs=rngs)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask: jax.Array | None = None,
        places: jax.Array | None = None,
        depth: jax.Array | None = None,
    ) -> jax.Array:
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD), mask, places, depth)
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))

    def extend(
        self, x_BxSxD: jax.Array, cache: Cache, positions: jax.Array, depth: jax.Array | None
    ) -> tuple[jax.Array, Cache]:
        """The same for S more tokens, which attend to the cached ones too."""
        mixed_BxSxD, cache = self.attention.extend(
            self.attention_norm(x_BxSxD), cache, positions, depth
        )
        x_BxSxD = x_BxSxD + mixed_BxSxD
        return x_BxSxD + self.mlp(self.mlp_norm(x_BxSxD)), cache


class Decoder(nnx.Module):
    """Next-token logits from tokens.

    Args:
      config: shape and arithmetic.
      rngs: the source of the initial parameters, which are float32 and made without a mesh.

    >>> import jax.numpy as jnp
    >>> config = DecoderConfig(vocab_size=256, context=8, width=16, layers=2, heads=2)
    >>> Decoder(config, rngs=nnx.Rngs(0))(jnp.zeros((3, 8), int)).shape
    (3, 8, 256)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tokens = _table(config, rngs)
        learned = config.positions == "learned"
        self.positions = (
            LearnedPositions(config.context, config.width, rngs=rngs) if learned else None
        )
        self.blocks = make_blocks(
            lambda: Block(config, rngs=rngs), config.layers, scanned=config.scan_layers
        )
        self.norm = _norm(config)
        self.head = None if config.tied else _table(config, rngs)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        constrain: Constrain = identity,
        segments_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits for the token after each position, which depend on no later token.

        Args:
          tokens_BxT: int[B, T], T at most the context. A token of V or above gives NaN.
          constrain: applied to the residual stream, float[B, T, D], after the embedding and after
            each block; a trainer on a mesh passes a `jax.lax.with_sharding_constraint` closure.
            It is an argument because a model knows no mesh: a constraint inside the blocks would
            fail under the vmap of a curvature estimator, which passes none, and jit's cache cannot
            see one that is read from a context variable.
          segments_BxT: int[B, T], the number of each token's sequence in a packed row, with another
            number for padding. A token attends to its own sequence only, and its position counts
            from the start of that sequence.

        Returns:
          float32[B, T, V], whatever the compute dtype; V is `config.padded_vocab`.

        Raises:
          ValueError: if T exceeds the context.
        """
        return self.logits(self.features(tokens_BxT, constrain, segments_BxT))

    def features(
        self,
        tokens_BxT: jax.Array,
        constrain: Constrain = identity,
        segments_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """The input of the last matrix product, float[B, T, D]; arguments as in `__call__`."""
        check_length(tokens_BxT, self.config.context)
        mask, places = separate(segments_BxT)
        x_BxTxD = self.tokens(tokens_BxT)
        if self.positions is not None:
            x_BxTxD = self.positions(x_BxTxD, places)
        x_BxTxD, _ = through_blocks(
            self.blocks,
            lambda block, x, depth: (block(x, mask, places, depth), None),
            constrain(x_BxTxD.astype(self.config.dtype)),
            self._depths(),
            layers=self.config.layers,
            remat=self.config.remat,
            constrain=constrain,
        )
        return self.norm(x_BxTxD)

    def extend(
        self, tokens_BxS: jax.Array, cache: Cache, position: int | jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Features of S more tokens in each row, float[B, S, D]; see `models.cached`."""
        rows, length = tokens_BxS.shape
        starts_Bx1 = jnp.broadcast_to(jnp.asarray(position, jnp.int32), (rows,))[:, None]
        places_BxS = starts_Bx1 + jnp.arange(length, dtype=jnp.int32)
        x_BxSxD = self.tokens(tokens_BxS)
        if self.positions is not None:
            x_BxSxD = self.positions(x_BxSxD, places_BxS)
        x_BxSxD, cache = through_blocks(
            self.blocks,
            lambda block, x, own: block.extend(x, own[1], places_BxS, own[0]),
            x_BxSxD.astype(self.config.dtype),
            (self._depths(), cache),
            layers=self.config.layers,
        )
        inside_BxS = (places_BxS >= 0) & (places_BxS < cache.key.shape[2])
        return jnp.where(inside_BxS[..., None], self.norm(x_BxSxD), jnp.nan), cache

    def _depths(self) -> jax.Array | None:
        """The divisor of each block's attention scores, float32[layers]; None for no division."""
        if not self.config.attention_layer_scale:
            return None
        return jnp.arange(1, self.config.layers + 1, dtype=jnp.float32)

    def logits(self, x_xD: jax.Array) -> jax.Array:
        """float32[..., V] from the features of any number of positions."""
        return (self.tokens if self.head is None else self.head).logits(x_xD)

    def unembedding(self) -> tuple[jax.Array, jax.Array | None]:
        """(float32[V, D], float32[V] or None): logits are `x @ matrix.T + bias`."""
        return (self.tokens if self.head is None else self.head).unembedding()


def check_length(tokens_BxT: jax.Array, context: int) -> None:
    """Raises ValueError if T exceeds the context."""
    length = tokens_BxT.shape[-1]
    if length > context:
        raise ValueError(
            f"{length} tokens, but there are positions for {context}: crop the tokens to the "
            f"last {context}, or make the model with context={length}."
        )
