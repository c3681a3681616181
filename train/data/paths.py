"""Paths and globs of data; a path that exists is taken literally, brackets and stars included."""

import glob
from pathlib import Path


def absolute(path: str) -> str:
    """A path or glob as an absolute one, so that it means the same from any folder.

    >>> absolute("/data/*.txt")
    '/data/*.txt'
    """
    return str(Path(path).expanduser().absolute())


def files_of(pattern: str) -> list[Path]:
    """The files of a path or glob, sorted by name.

    Whatever exists is taken literally, brackets and stars included: first the whole path, then
    the longest existing folder that leads to a glob.
    """
    path = Path(absolute(pattern))
    if path.is_file():
        return [path]
    found = sorted(map(Path, glob.glob(_escaped(path), recursive=True)))
    return [file for file in found if file.is_file()]


def _escaped(path: Path) -> str:
    """The pattern, with the longest existing folder escaped so that it matches literally."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    return str(Path(glob.escape(str(folder)), path.relative_to(folder)))
