"""Named decoder configs."""

from models.decoder import DecoderConfig

PRESETS: dict[str, DecoderConfig] = {
    "tiny": DecoderConfig(vocab_size=256, context=64, layers=2, heads=4, width=64),
    "gpt2-30m": DecoderConfig(layers=6, heads=6, width=384),
    "gpt2-125m": DecoderConfig(layers=12, heads=12, width=768),
    "gpt2-355m": DecoderConfig(layers=24, heads=16, width=1024),
    "gpt2-540m": DecoderConfig(layers=30, heads=18, width=1152),
    "gpt2-770m": DecoderConfig(layers=36, heads=20, width=1280),
}
"""Byte-level `tiny`, and GPT-2 at five sizes; counts without positions are .115, 29.9, 123.6,
353.6, 535.8 and 772.3 million parameters."""
