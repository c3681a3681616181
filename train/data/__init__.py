"""Training data: `load` turns a `DataConfig` into batches that are functions of the step number."""

from train.data.config import DataConfig
from train.data.embedded import Corpus, decode, encode, shakespeare
from train.data.load import load, resolved
from train.data.placement import to_mesh
from train.data.rows import Data, batch_shapes

__all__ = [
    "Corpus",
    "Data",
    "DataConfig",
    "batch_shapes",
    "decode",
    "encode",
    "load",
    "resolved",
    "shakespeare",
    "to_mesh",
]
