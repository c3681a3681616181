"""Where else metrics go than into `metrics.jsonl`; the libraries are imported when asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.extras import need


class Writer(Protocol):
    """Takes the metrics of steps."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The finite values and the others of one step; a step may come twice, with other names."""

    def close(self) -> None:
        """Nothing is written after it."""


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, start: int = 0):
        # Steps after `start` are about to be run again: those of a run before are not shown.
        library = need("tensorboardX", "tensorboard", "--output.tensorboard")
        self._writer = library.SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the events."""
        self._writer.close()


class Wandb:
    """A run of a project at Weights & Biases; a run that is resumed goes on there too."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]):
        library = need("wandb", "wandb", "--output.wandb")
        self._run = library.init(
            project=project,
            dir=str(folder),
            id=folder.resolve().name,
            name=folder.resolve().name,
            config=dict(config),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of each curve."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Waits for the upload."""
        self._run.finish()
