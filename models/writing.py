"""Files that are whole or absent, whenever the process is killed, and that stay in their folder."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Puts what `write(temporary path)` makes in the place of `path`, at once.

    A link at `path` is replaced, not followed: a folder that came from somewhere else cannot make
    this write outside of it. The temporary name is drawn at random, so no link waits there.
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
    """`replace` by a text, as UTF-8."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


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
