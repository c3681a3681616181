"""Atomic writes: after a kill at any moment a file is either old or new, and never partial."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces `path` atomically by the file that `write(temporary path)` writes.

    A link at `path` is replaced and not followed, so that a folder from elsewhere cannot redirect
    the write. The temporary name is random, so that no link can be prepared under it.
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
    """Replaces `path` atomically by a text in UTF-8."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Syncs a folder, if the file system supports it."""
    with contextlib.suppress(OSError):
        sync(path)
