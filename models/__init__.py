"""Language models as Flax NNX modules; imports jax, numpy and flax only."""

from models.config import DecoderConfig, EncoderConfig
from models.decoder import Decoder
from models.encoder import Encoder
from models.functional import Functional, split
from models.masking import mask_tokens
from models.presets import BERT, LLAMA, PRESETS, QWEN3

__all__ = [
    "PRESETS",
    "LLAMA",
    "QWEN3",
    "BERT",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "Functional",
    "mask_tokens",
    "split",
]
