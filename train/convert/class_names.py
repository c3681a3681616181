"""The class names of a classifier's data."""

from train import data
from train.config.schema import Config


def class_names(config: Config) -> tuple[str, ...]:
    """The names of a run's classes; its data is read for them.

    Raises:
      OSError, ValueError: the data cannot be read.
    """
    sizes = {"batch_size": config.batch_size, "sequence_length": config.sequence_length}
    return data.load(config.data, **sizes, seed=config.seed).class_names
