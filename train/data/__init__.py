"""Tokens to train on: `load` turns a `DataConfig` into batches that are functions of the step."""

from train.data.config import DataConfig
from train.data.embedded import Corpus, decode, encode, shakespeare
from train.data.load import load, settled
from train.data.placement import to_mesh
from train.data.rows import Data, batch_shapes
from train.data.tasks.windows import batch, heldout_batches

__all__ = [
    "Corpus",
    "Data",
    "DataConfig",
    "batch",
    "batch_shapes",
    "decode",
    "encode",
    "heldout_batches",
    "load",
    "settled",
    "shakespeare",
    "to_mesh",
]
