"""Named configs, family by family, and all of them in `PRESETS`.

The tiny ones read bytes and train in under two minutes on two cores.
"""

import dataclasses

from models.config import DecoderConfig, EncoderConfig

_TINY = DecoderConfig(vocab_size=256, context=64, layers=2, heads=4, width=64)

GPT2: dict[str, DecoderConfig] = {
    "tiny": _TINY,
    "gpt2-30m": DecoderConfig(layers=6, heads=6, width=384),
    "gpt2-125m": DecoderConfig(layers=12, heads=12, width=768),
    "gpt2-355m": DecoderConfig(layers=24, heads=16, width=1024),
    "gpt2-540m": DecoderConfig(layers=30, heads=18, width=1152),
    "gpt2-770m": DecoderConfig(layers=36, heads=20, width=1280),
}
"""Byte-level `tiny`, and GPT-2 at five sizes. Without position embeddings they have .115, 29.9,
123.6, 353.6, 535.8 and 772.3 million parameters."""

_LLAMA = DecoderConfig(
    vocab_size=32_000,
    context=4096,
    width=4096,
    layers=32,
    heads=32,
    ffn_width=11_008,
    norm="rmsnorm",
    positions="rope",
    mlp="swiglu",
    tied=False,
)
_SMALL_LLAMA = dataclasses.replace(_LLAMA, context=1024, norm_eps=1e-6)
_TINY_SIZES = {"vocab_size": 256, "context": 64, "width": 64, "layers": 2, "heads": 4}

LLAMA: dict[str, DecoderConfig] = {
    "tiny-llama": dataclasses.replace(_LLAMA, **_TINY_SIZES, kv_heads=2, ffn_width=176),
    "llama-60m": dataclasses.replace(_SMALL_LLAMA, layers=8, width=512, heads=8, ffn_width=1376),
    "llama-130m": dataclasses.replace(_SMALL_LLAMA, layers=12, width=768, heads=12, ffn_width=2048),
    "llama-350m": dataclasses.replace(
        _SMALL_LLAMA, layers=24, width=1024, heads=16, ffn_width=2736
    ),
    "llama-1b": dataclasses.replace(_SMALL_LLAMA, layers=24, width=2048, heads=32, ffn_width=5461),
    "llama2-7b": _LLAMA,
}
"""Byte-level `tiny-llama` with shared key/value heads, the small Llamas of GaLore's release (Zhao
et al. 2024) and Llama-2 (Touvron et al. 2023). They have .125, 58.07, 134.11, 367.97, 1339.08 and
6738.42 million parameters."""

_QWEN3 = dataclasses.replace(
    _LLAMA,
    vocab_size=151_936,
    context=40_960,
    width=1024,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    ffn_width=3072,
    norm_eps=1e-6,
    rope_theta=1e6,
    qk_norm=True,
    tied=True,
)
_SMALL_QWEN3 = dataclasses.replace(_QWEN3, context=1024, kv_heads=0, head_dim=0, ffn_width=0)

QWEN3: dict[str, DecoderConfig] = {
    "tiny-qwen3": dataclasses.replace(
        _QWEN3, **_TINY_SIZES, kv_heads=2, head_dim=32, ffn_width=176
    ),
    "qwen3-134m": dataclasses.replace(_SMALL_QWEN3, layers=32, width=512, heads=8),
    "qwen3-134m-gqa": dataclasses.replace(
        _SMALL_QWEN3,
        vocab_size=49_152,
        layers=30,
        width=576,
        heads=9,
        kv_heads=3,
        ffn_width=1536,
    ),
    "qwen3-0.6b": _QWEN3,
}
"""Byte-level `tiny-qwen3`, whose heads are wider than width / heads (.134 million parameters); two
readings of "Qwen 3 architecture, 134M", which count 134.26 million without embeddings and 134.52
with them; and the smallest published Qwen3 (596.05)."""

BERT: dict[str, EncoderConfig] = {
    "tiny-bert": EncoderConfig(vocab_size=260, context=64, layers=2, heads=4, width=64),
    "bert-small": EncoderConfig(layers=4, width=512, heads=8),
    "bert-base": EncoderConfig(),
}
"""`tiny-bert`, whose tokens are 256 bytes, [PAD] 256, [CLS] 257, [SEP] 258 and [MASK] 259;
`bert-small` of Turc et al. 2019; `bert-base` of Devlin et al. 2019. They have .125, 28.76 and
109.48 million parameters with the pooler and without a head."""

BYTE_IDS: dict[str, int] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
"""Special tokens of the byte vocabulary, by their names in `transformers`: the control characters
start of text, end of text and NUL."""

PRESETS: dict[str, DecoderConfig | EncoderConfig] = {**GPT2, **LLAMA, **QWEN3, **BERT}
"""Every named config."""
