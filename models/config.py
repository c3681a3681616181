"""The frozen configs of decoders and encoders."""

import dataclasses
from typing import Any, Literal, get_args, get_origin

AttentionName = Literal["xla", "cudnn"]
DtypeName = Literal["float32", "bfloat16"]
RematName = Literal["none", "dots", "full"]
LARGEST = 2**31 - 1  # sizes are int32 on devices
MOST = {"layers": 2**12, "context": 2**24, "vocab_multiple": 2**20}
"""Upper bounds of sizes that would cost much time or memory before another check refused them."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and arithmetic of a decoder; the defaults are GPT-2 small without biases.

    GPT-2 has pre-LN blocks (eps 1e-5, scale only), tanh GELU, a feed-forward layer four times the
    width, learned positions and a tied head. Matrices are initialised as N(0, 0.02), and those that
    write to the residual stream as N(0, 0.02 / sqrt(2 layers)). `models.presets` has the configs of
    Llama-2 and Qwen3.

    Raises:
      ValueError: a size is below one, heads do not divide the width, key/value heads do not divide
        the heads, a head has odd width with rotary positions, a name is unknown, or cuDNN attention
        is asked for in float32.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section
    2.3; without biases and with a padded vocabulary as in nanoGPT.

    >>> DecoderConfig(width=384, layers=6, heads=6).head_width
    64
    """

    vocab_size: int = 50304
    """Tokens: GPT-2's 50257, padded to a multiple of 128 for the hardware."""
    vocab_multiple: int = 1
    """Token tables are padded to a multiple of this; the mesh's tensor axis must divide it."""
    context: int = 1024
    """Longest sequence in tokens; learned positions have one vector for each."""
    width: int = 768
    """Width of the residual stream."""
    layers: int = 12
    """Number of blocks, each attention then feed-forward."""
    heads: int = 12
    """Number of attention heads; must divide the width unless head_dim is given."""
    kv_heads: int = 0
    """Number of key/value heads, each shared by heads / kv_heads query heads; 0 for one each."""
    head_dim: int = 0
    """Width of one attention head; 0 for width / heads."""
    ffn_width: int = 0
    """Hidden width of the feed-forward layer; 0 for four times the width."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, before the feed-forward layer, and before the head."""
    norm_eps: float = 1e-5
    """Added to the variance or mean square before the square root."""
    positions: Literal["learned", "rope"] = "learned"
    """Vectors added to the embeddings, or queries and keys rotated by their position."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths, 2 pi theta^(2i / head width)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward layer: two matrices around a tanh GELU, or three with a SiLU gate."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head (RMSNorm) before they are rotated."""
    tied: bool = True
    """Compute logits with the token embeddings; otherwise with a table of their own."""
    bias: bool = False
    """Every projection and every LayerNorm has a bias, as in OpenAI's GPT-2."""
    attention_layer_scale: bool = False
    """Also divide the attention scores of layer i = 0, 1, ... by i + 1."""
    attention: AttentionName = "xla"
    """Attention kernel: xla runs anywhere and has second derivatives; cudnn is faster on a GPU."""
    dtype: DtypeName = "float32"
    """Dtype of activations and matrix products; parameters, norms, softmax, logits are float32."""
    scan_layers: bool = False
    """Compile one block for all layers, with stacked parameters [layers, ...]."""
    remat: RematName = "none"
    """Recomputed in the backward pass: none, dots (all but dense products), or full (all)."""

    def __post_init__(self):
        _check(self, derived=("kv_heads", "head_dim", "ffn_width"))
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} key/value heads equally: choose "
                "kv_heads that divide heads, or 0 for as many."
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"a head of width {self.head_width} cannot be rotated, which pairs coordinates: "
                "make head_dim, or width / heads, even."
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.width // self.heads

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding, and logits per position; padding has probability zero.

        >>> DecoderConfig(vocab_size=50257, vocab_multiple=128).padded_vocab
        50304
        """
        return _round_up(self.vocab_size, self.vocab_multiple)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and arithmetic of an encoder with its head; the defaults are BERT base.

    BERT has post-LN blocks with biases, exact GELU and learned positions. Matrices are initialised
    as N(0, 0.02) and biases as zero. There is no dropout.

    Raises:
      ValueError: a size is below one, heads do not divide the width, a name is unknown, or cuDNN
        attention is asked for in float32.

    Source: Devlin et al. 2019, "BERT", section 3 and appendix A.

    >>> EncoderConfig(width=512, layers=4, heads=8).head_width
    64
    """

    vocab_size: int = 30522
    """Number of tokens."""
    vocab_multiple: int = 1
    """Token tables are padded to a multiple of this; the mesh's tensor axis must divide it."""
    context: int = 512
    """Longest sequence in tokens; each position has a learned vector."""
    width: int = 768
    """Width of the residual stream."""
    layers: int = 12
    """Number of blocks, each attention then feed-forward."""
    heads: int = 12
    """Number of attention heads; must divide the width."""
    ffn_width: int = 0
    """Hidden width of the feed-forward layer; 0 for four times the width."""
    token_types: int = 2
    """Rows of the table that tells a first sentence from a second."""
    classes: int = 0
    """Number of classes of a head on the first token; 0 for a masked-language-model head."""
    norm_eps: float = 1e-12
    """Added to the variance before the square root."""
    attention: AttentionName = "xla"
    """Attention kernel: xla runs anywhere and has second derivatives; cudnn is faster on a GPU."""
    dtype: DtypeName = "float32"
    """Dtype of activations and matrix products; parameters, norms, softmax, logits are float32."""
    scan_layers: bool = False
    """Compile one block for all layers, with stacked parameters [layers, ...]."""
    remat: RematName = "none"
    """Recomputed in the backward pass: none, dots (all but dense products), or full (all)."""

    def __post_init__(self):
        _check(self, counts=("token_types",), derived=("ffn_width", "classes"))

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding, and logits per position; padding has probability zero.

        >>> EncoderConfig(vocab_multiple=16).padded_vocab
        30528
        """
        return _round_up(self.vocab_size, self.vocab_multiple)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check(config: Any, *, counts: tuple[str, ...] = (), derived: tuple[str, ...]) -> None:
    """Checks sizes (the `derived` ones may be 0), names, floats and attention."""
    sizes = ("vocab_size", "vocab_multiple", "context", "width", "layers", "heads")
    for name in (*sizes, *counts, *derived):
        size, least = getattr(config, name), 0 if name in derived else 1
        if size < least:
            raise ValueError(f"{name} is {size}, but it is a count: set it to {least} or more.")
        if size > (most := MOST.get(name, LARGEST)):
            raise ValueError(f"{name} is {size}, beyond any model: set it to {most} at most.")
    if not getattr(config, "head_dim", 0) and config.width % config.heads:
        raise ValueError(
            f"width {config.width} cannot be cut into {config.heads} heads of equal width: choose "
            f"heads that divide it, or width {config.width // config.heads * config.heads}."
        )
    for field in dataclasses.fields(config):
        value, known = getattr(config, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in known:
            raise ValueError(
                f"{field.name} {value!r} is unknown: choose one of {', '.join(known)}."
            )
        if field.type is float and not value > 0:
            raise ValueError(f"{field.name} is {value}: set it above 0.")
    if config.attention == "cudnn" and config.dtype == "float32":
        raise ValueError(
            "cuDNN attention has no float32 kernel: set dtype='bfloat16' or attention='xla' (with "
            "flags --model.dtype bfloat16; --precision comes too late for it)."
        )
