"""Files that are whole or absent, and that stay in their folder."""

from pathlib import Path

from models.writing import replace, replace_text, sync

__all__ = ["inside", "replace", "replace_text", "sync"]


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
