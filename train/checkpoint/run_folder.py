"""The folder of a run: its name, the lock on it, and whether another run has taken it."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from train import files, lock
from train.checkpoint import manifest
from train.checkpoint.store import Checkpoints
from train.config import command_line, serialize
from train.config.schema import Config
from train.parallel import processes
from train.program import Program


class Run(NamedTuple):
    """A run whose folder is open: what it trains, and where it saves."""

    config: Config
    folder: Path
    programs: Program
    checkpoints: Checkpoints


@contextlib.contextmanager
def new(config: Config) -> Iterator[Path]:
    """The folder for a new run, locked.

    Raises:
      ValueError: another run has the folder, or the processes disagree about the config.
    """
    check_same(config)
    folder = Path(config.output.folder or f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = Path(processes.from_main(str(folder)))
    processes.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    with locked(folder):
        processes.on_main(lambda: _must_be_free(folder))
        yield folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, on process 0 for all.

    Raises:
      ValueError: the folder does not exist, or another process uses it.
    """

    def hold() -> None:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ValueError(f"{folder} {what}: give the folder of a run.")
        stack.enter_context(lock.hold(folder, print))

    with contextlib.ExitStack() as stack:
        processes.on_main(hold)
        yield


def check_same(config: Config, **options: Any) -> None:
    """Raises ValueError where config, versions or options are not the same on all processes."""
    shared = {"config": serialize.to_json(config), "versions": manifest.versions()}
    processes.check_same(shared | options)


def checkpoints(config: Config, folder: Path) -> Checkpoints:
    """The checkpoints in a run's folder, limited to the number that the config keeps."""
    return Checkpoints(
        files.inside(folder, "checkpoints"), keep_last=config.output.keep_checkpoints
    )


def _must_be_free(folder: Path) -> None:
    if (folder / "config.json").exists():
        raise ValueError(
            f"{folder} already holds a run: resume it with "
            f"`{command_line.call('resume', folder)}`, or choose another --output.folder."
        )
