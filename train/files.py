"""Files that are whole or absent, whenever the process is killed, and that stay in their folder."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Puts what `write(temporary path)` makes in the place of `path`, at once.

    A link at `path` is replaced, not followed: a run's folder that came from somewhere else
    cannot make this write outside of it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """`replace` by a text."""
    replace(path, lambda temporary: temporary.write_text(text))


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, which must not be a link that leads out of the folder.

    Raises:
      ValueError: it is.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside of the run's folder: move that into "
            "the folder, or link the whole folder instead."
        )
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Returns when a file, or the list of names of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
