"""Where data is: paths that are taken literally where they exist, globs, and what is no path."""

import glob
import re
from pathlib import Path


def check_local(place: str | Path, flag: str) -> None:
    """Refuses an address such as gs://bucket/a, which would be taken for a path.

    Args:
      place: a path, or a source with its kinds; a `Path` has lost one of its two slashes.
      flag: what it was given as, to begin the message with.

    Raises:
      ValueError: it has an address in it.

    >>> check_local("text:books/*.txt,bin:/data:0.5", "data.source")
    """
    found = re.search(r"([A-Za-z][A-Za-z0-9+.-]*)://", str(place))
    if isinstance(place, Path):
        found = found or re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(place))
    if found:
        raise ValueError(
            f"{flag} {str(place)!r} names a place by {found[1]}://, but only paths of this machine "
            "are read and written: mount the place or copy it here, and give its path"
            f"{', without file://' if found[1].lower() == 'file' else ''}."
        )


def absolute(path: str) -> str:
    """A path or glob from the root on, so that it means the same from any folder.

    >>> absolute("/data/*.txt")
    '/data/*.txt'
    """
    return str(Path(path).expanduser().absolute())


def files_of(pattern: str) -> list[Path]:
    """The files of a path or glob, by name.

    What exists is taken literally, brackets and stars included: first the whole path, then each
    folder that leads to a glob.
    """
    path = Path(absolute(pattern))
    if path.is_file():
        return [path]
    found = sorted(map(Path, glob.glob(_escaped(path), recursive=True)))
    return [file for file in found if file.is_file()]


def _escaped(path: Path) -> str:
    """The pattern with the longest folder that exists kept from being one."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    return str(Path(glob.escape(str(folder)), path.relative_to(folder)))
