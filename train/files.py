"""Files that are whole or absent, whenever the process is killed, and that stay in their folder."""

import contextlib
import os
import re
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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


def sync_folder(path: Path) -> None:
    """`sync` of a folder, where the file system can."""
    with contextlib.suppress(OSError):
        sync(path)


def check_local(path: str | Path, name: str) -> None:
    """Raises ValueError for an address such as gs://bucket/run, in whose place `name` stands.

    As a `Path` it has one slash. Nothing here writes to or reads from object stores, and a folder
    of that name would not be what was meant.
    """
    if re.match(f"[A-Za-z][A-Za-z0-9+.-]+:/{'' if isinstance(path, Path) else '/'}", str(path)):
        raise ValueError(
            f"{name} {path} is an address, not a folder of this machine: mount the store (such as "
            "with gcsfuse or s3fs) and give the path of the mount."
        )
