"""What reading a source gives: files, the records in them, and the faults in place of records."""

from pathlib import Path
from typing import Any, NamedTuple

from train.data.config import DataConfig


class Broken(ValueError):
    """Data that cannot be read; the message begins with the file and the line."""


class SourceFile(NamedTuple):
    """One file of a source: the unit of work of one thread."""

    kind: str  # a key of `documents.READERS`
    path: Path
    decode: Any = None  # tfds only: bytes of an example -> dict of its features


class Record(NamedTuple):
    """One document, line, row or example."""

    where: str  # file and line, for messages
    fields: dict[str, Any]


def short(value: Any) -> str:
    """A value as a message shows it, cut to 40 characters."""
    shown = repr(value)
    return shown if len(shown) < 40 else shown[:40] + "..."


def over_limit(config: DataConfig) -> str:
    """The part of a message that says which limit was exceeded."""
    return f"more than --data.document-limit {config.document_limit}"
