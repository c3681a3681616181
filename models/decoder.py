"""The decoder: one NNX module driven by one frozen config."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
from flax import nnx

from models.layers import (
    INIT_STDDEV,
    Attention,
    GeluMlp,
    LayerNorm,
    LearnedPositions,
    TiedEmbedding,
)

Constrain = Callable[[jax.Array], jax.Array]
AttentionName = Literal["xla", "cudnn"]
DtypeName = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and arithmetic of a decoder; the defaults are GPT-2 small without biases.

    Pre-LN blocks (eps 1e-5, scale only), tanh GELU, a feed-forward layer four times the width,
    learned positions and a tied head. Matrices start N(0, 0.02), those that write to the residual
    stream N(0, 0.02 / sqrt(2 layers)).

    Raises:
      ValueError: for sizes below one, a width the heads do not divide, an unknown name, or cuDNN
        attention in float32.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section
    2.3; without biases and with a padded vocabulary as in nanoGPT.

    >>> DecoderConfig(width=384, layers=6, heads=6).head_width
    64
    """

    vocab_size: int = 50304
    """Rows of the embedding: GPT-2's 50257 tokens, padded to a multiple of 128 for the hardware."""
    context: int = 1024
    """Longest sequence, in tokens: one learned position each."""
    width: int = 768
    """Width of the residual stream."""
    layers: int = 12
    """Number of blocks, each attention then feed-forward."""
    heads: int = 12
    """Attention heads; must divide the width."""
    attention_layer_scale: bool = False
    """Also divide the attention scores of layer i = 0, 1, ... by i + 1."""
    attention: AttentionName = "xla"
    """Attention kernel: xla runs anywhere and has second derivatives; cudnn is faster on a GPU."""
    dtype: DtypeName = "float32"
    """Dtype of activations and matrix products; parameters, norms, softmax, logits are float32."""

    def __post_init__(self):
        for name in ("vocab_size", "context", "width", "layers", "heads"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {size}, but counts something: set it to 1 or more.")
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} cannot be cut into {self.heads} heads of equal width: choose "
                f"heads that divide it, or width {self.width // self.heads * self.heads}."
            )
        _check_name("attention", self.attention, get_args(AttentionName))
        _check_name("dtype", self.dtype, get_args(DtypeName))
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError(
                "cuDNN attention has no float32 kernel: set dtype='bfloat16' or attention='xla'."
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


def _check_name(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{field} {value!r} is unknown: choose one of {', '.join(known)}.")


def identity(x: jax.Array) -> jax.Array:
    """The constraint that constrains nothing."""
    return x


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): float[B, T, D] to the same."""

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        out_stddev = INIT_STDDEV / (2 * config.layers) ** 0.5
        depth = layer + 1 if config.attention_layer_scale else 1
        self.attention_norm = LayerNorm(config.width)
        self.attention = Attention(
            config.width,
            config.heads,
            scale=config.head_width**-0.5 / depth,
            out_stddev=out_stddev,
            implementation=config.attention,
            rngs=rngs,
        )
        self.mlp_norm = LayerNorm(config.width)
        self.mlp = GeluMlp(config.width, 4 * config.width, out_stddev=out_stddev, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD))
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))


class Decoder(nnx.Module):
    """Next-token logits from tokens.

    Args:
      config: shape and arithmetic.
      rngs: the source of the initial parameters. They are float32, and made without a mesh.

    >>> import jax.numpy as jnp
    >>> config = DecoderConfig(vocab_size=256, context=8, width=16, layers=2, heads=2)
    >>> Decoder(config, rngs=nnx.Rngs(0))(jnp.zeros((3, 8), int)).shape
    (3, 8, 256)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tokens = TiedEmbedding(config.vocab_size, config.width, rngs=rngs)
        self.positions = LearnedPositions(config.context, config.width, rngs=rngs)
        blocks = {_name(layer): Block(config, layer, rngs=rngs) for layer in range(config.layers)}
        self.blocks = nnx.Dict(blocks)
        self.norm = LayerNorm(config.width)

    def __call__(self, tokens_BxT: jax.Array, constrain: Constrain = identity) -> jax.Array:
        """Logits of the token after each position, which depend on no later token.

        Args:
          tokens_BxT: int[B, T], T at most the context. A token of V or above makes NaN.
          constrain: applied to the residual stream, float[B, T, D], after the embedding and after
            each block; a trainer on a mesh passes a `jax.lax.with_sharding_constraint` closure.
            It is an argument because a model knows no mesh: a constraint written into the blocks
            fails under the vmap of a curvature estimator, which passes none, and one read from a
            context variable is invisible to jit's cache, which would serve a program traced with
            the other.

        Returns:
          float32[B, T, V], whatever the compute dtype.

        Raises:
          ValueError: if T exceeds the context.
        """
        length, context = tokens_BxT.shape[-1], self.config.context
        if length > context:
            raise ValueError(
                f"{length} tokens, but there are positions for {context}: crop the tokens to the "
                f"last {context}, or make the model with context={length}."
            )
        x_BxTxD = constrain(self.positions(self.tokens(tokens_BxT)).astype(self.config.dtype))
        for layer in range(self.config.layers):
            x_BxTxD = constrain(self.blocks[_name(layer)](x_BxTxD))
        return self.tokens.logits(self.norm(x_BxTxD))


def _name(layer: int) -> str:
    # A string, since checkpoints turn integer keys into strings. Looked up by name, since a
    # pytree's dicts come back sorted, and "10" sorts before "2".
    return f"{layer:02d}"
