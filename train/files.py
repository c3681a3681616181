"""Files of a run: written whole or not at all, and only inside its folder."""

import re
from pathlib import Path

from models.writing import replace, replace_text, sync, sync_folder

__all__ = ["check_local", "inside", "replace", "replace_text", "sync", "sync_folder"]


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, which must not lead out of the folder.

    Raises:
      ValueError: it is a link to another place.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside of the run's folder: move that into "
            "the folder, or link the whole folder instead."
        )
    return path


def check_local(place: str | Path, name: str) -> None:
    """Refuses an address such as gs://bucket/a, which would be taken for a path.

    Args:
      place: a path, or a data source; a `Path` has lost one of its two slashes.
      name: of the flag or argument, to begin the message with.

    Raises:
      ValueError: it contains an address.

    >>> check_local("text:books/*.txt,bin:/data:0.5", "data.source")
    """
    found = re.search(r"([A-Za-z][A-Za-z0-9+.-]*)://", str(place))
    if isinstance(place, Path):
        found = found or re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(place))
    if found:
        raise ValueError(
            f"{name} {place} is an address, not a path of this machine: mount the store (such as "
            "with gcsfuse or s3fs) or copy the files here, and give their path"
            f"{', without file://' if found[1].lower() == 'file' else ''}."
        )
