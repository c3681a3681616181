"""Language models as Flax NNX modules; imports jax and flax only."""

from models.decoder import Decoder, DecoderConfig
from models.functional import Functional, split
from models.presets import PRESETS

__all__ = ["PRESETS", "Decoder", "DecoderConfig", "Functional", "split"]
