"""Trackers of experiments, which get the metrics of a run beside `metrics.jsonl`.

Their libraries are imported only when a run asks for them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.config.output import OutputConfig
from train.extras import need


class Tracker(Protocol):
    """Takes the metrics of steps."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The values of one step, finite or not. A step may come twice, with different metrics."""

    def close(self) -> None:
        """Nothing is written after it."""


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, start: int = 0):
        # A resumed run repeats the steps after `start`: their earlier values must not be shown.
        library = need("tensorboardX", "tensorboard", "--output.tensorboard")
        self._writer = library.SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the events."""
        self._writer.close()


class Experiment:
    """A run of wandb or trackio, whose libraries have the same interface."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of each curve."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Waits until all is written or uploaded."""
        self._run.finish()


def wandb(project: str, folder: Path, config: Mapping[str, Any]) -> Experiment:
    """A run of a project at Weights & Biases; a resumed run goes on there too."""
    library, name = need("wandb", "wandb", "--output.wandb"), folder.resolve().name
    run = library.init(
        project=project, dir=str(folder), id=name, name=name, config=dict(config), resume="allow"
    )
    return Experiment(run)


def trackio(project: str, folder: Path, config: Mapping[str, Any]) -> Experiment:
    """A run of a project in trackio's local database, which `trackio show` draws.

    A resumed run goes on there too; steps that it repeats are there twice.
    """
    library, name = need("trackio", "trackio", "--output.trackio"), folder.resolve().name
    quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    run = library.init(project=project, name=name, config=dict(config), resume="allow", **quiet)
    return Experiment(run)


def asked_for(
    output: OutputConfig, folder: Path, config: Mapping[str, Any], start: int
) -> list[Tracker]:
    """The trackers that a run asks for.

    Args:
      output: says which.
      folder: of the run.
      config: of the run, in plain JSON values.
      start: steps already done.

    Raises:
      ValueError: a library is not installed.
    """
    found: list[Tracker] = []
    if output.tensorboard:
        found.append(TensorBoard(folder / "tensorboard", start))
    if output.wandb:
        found.append(wandb(output.wandb, folder, config))
    if output.trackio:
        found.append(trackio(output.trackio, folder, config))
    return found
