"""Language models as Flax NNX modules; imports jax, numpy and flax only.

`models.huggingface`, which is imported by itself, also needs safetensors.
"""

from models.attention import Cache
from models.config import DecoderConfig, EncoderConfig
from models.decoder import Decoder
from models.decoding import Cached, cached
from models.encoder import Encoder
from models.functional import Functional, split
from models.layout import logical_ndims, stack_blocks, unstack_blocks
from models.masking import mask_tokens
from models.presets import BERT, GPT2, LLAMA, PRESETS, QWEN3

__all__ = [
    "PRESETS",
    "GPT2",
    "LLAMA",
    "QWEN3",
    "BERT",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "Functional",
    "split",
    "Cached",
    "Cache",
    "cached",
    "stack_blocks",
    "unstack_blocks",
    "logical_ndims",
    "mask_tokens",
]
