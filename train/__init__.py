"""Training on a mesh of devices: `python -m train`, or `train(preset("tiny", "sophia-g"))`."""

from train.config import Config, preset
from train.loop import resume, train

__all__ = ["Config", "preset", "resume", "train"]
