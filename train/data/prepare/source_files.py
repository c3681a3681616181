"""The files of a source of documents."""

from pathlib import Path

from train.data import paths
from train.data.config import DataConfig
from train.data.prepare import tfds
from train.data.prepare.records import SourceFile
from train.data.source_string import parse_source


def source_files(source: str, config: DataConfig) -> tuple[list[SourceFile], tuple[str, ...]]:
    """The files of a source of documents, and the names of its text fields.

    Raises:
      ValueError: there are no such files, or the source holds tokens instead of documents.
    """
    kind, rest = parse_source(source)
    if kind in ("embedded", "bin"):
        raise ValueError(f"source {source!r} holds tokens, not documents: use text:, jsonl: ...")
    found = tfds.source_files(rest, config) if kind == "tfds" else _matching(kind, rest)
    fields = config.text_field or (tfds.text_field(rest) if kind == "tfds" else "text")
    return found, tuple(fields.split(","))


def _matching(kind: str, pattern: str) -> list[SourceFile]:
    """The files of a path or glob, sorted by name."""
    files = paths.files_of(pattern)
    if not files:
        place = paths.absolute(pattern)
        what = "is a folder" if Path(place).is_dir() else "matches no file"
        raise ValueError(
            f"{kind}:{pattern} {what}: give a file or a glob in quotes, such as "
            f"'{kind}:folder/**/*.{'txt' if kind == 'text' else kind}'. Looked for {place}."
        )
    return [SourceFile(kind, path) for path in files]
