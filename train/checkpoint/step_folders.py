"""The folders of steps: which exist, what a killed run left behind, and which are damaged."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from models import reading
from train import files
from train.checkpoint import digests
from train.checkpoint.errors import CheckpointError


def steps_in(folder: Path) -> set[int]:
    """The steps that have a folder.

    Raises:
      CheckpointError: something with the name of a step is a file, which cannot be read, or a
        link, which would lead writes out of the folder.
    """
    found = [path for path in folder.iterdir() if path.name.isdecimal()]
    for path in found:
        if path.is_symlink() or not path.is_dir():
            what = "a link" if path.is_symlink() else "a file"
            raise CheckpointError(
                f"{path} is {what} where the folder of a step should be: move it away, or put the "
                "folder itself there"
            )
    return {int(path.name) for path in found if str(int(path.name)) == path.name}


def clear_half_written(folder: Path) -> None:
    """Deletes what Orbax had not finished when a run was killed.

    Older versions kept metrics in each step. Orbax reads them before it writes, so metrics that
    are damaged are emptied.
    """
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in folder.glob("[0-9]*/metrics/metrics"):
        try:
            reading.read_json(path)
        except ValueError:
            files.replace_text(path, "{}")


def set_damaged_aside(folder: Path, steps: Sequence[int]) -> list[str]:
    """Renames steps whose own description is damaged, since Orbax would write no other step.

    Returns:
      A note for the user about each of them.
    """
    notes = []
    for step in steps:
        path = folder / str(step)
        if wrong := digests.description_fault(path):
            aside = path.rename(path.with_name(f"damaged-{step}-{time.strftime('%H%M%S')}"))
            notes.append(f"step {step} is damaged ({wrong}): it is now {aside}")
    return notes
