"""The documents of a source, in order, and what may be wrong with them."""

import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data import places
from train.data.config import DataConfig
from train.data.prepare import readers
from train.data.prepare.opening import Broken
from train.data.prepare.readers import Record, Shard


def documents(
    shard: Shard, config: DataConfig, fields: tuple[str, ...], skipped: list[str]
) -> Iterator[tuple[Any, ...]]:
    """The values of some fields of each record; those of text fields are not empty.

    Args:
      shard: to be read.
      config: its `broken` says whether a fault raises or is added to `skipped`.
      fields: text fields, then others.
      skipped: gets the faults.

    Raises:
      Broken: a fault, with file and line.
    """
    try:
        for record in readers.READERS[shard.kind](shard, config, fields):
            try:
                if isinstance(record, Broken):
                    raise record
                values = tuple(_value(record, field, config) for field in fields)
            except Broken as fault:
                if config.broken == "error":
                    raise
                skipped.append(str(fault))
            else:
                yield values
    except (OSError, EOFError, zlib.error, lzma.LZMAError, Broken) as error:
        fault = error if isinstance(error, Broken) else Broken(f"{shard.path}: {error}")
        if config.broken == "error":
            hint = ". Repair or remove it, or pass over what is broken: --data.broken skip."
            raise Broken(str(fault).rstrip(".") + hint) from error
        skipped.append(str(fault))


def shards(kind: str, pattern: str) -> list[Shard]:
    """The files of a path or glob, by name.

    Raises:
      ValueError: there are none.
    """
    files = places.files_of(pattern)
    if not files:
        place = places.absolute(pattern)
        what = "is a folder" if Path(place).is_dir() else "matches no file"
        raise ValueError(
            f"{kind}:{pattern} {what}: give a file or a glob in quotes, such as "
            f"'{kind}:folder/**/*.{'txt' if kind == 'text' else kind}'. Looked for {place}."
        )
    return [Shard(kind, path) for path in files]


def _value(record: Record, field: str, config: DataConfig) -> Any:
    """A field; strings are checked, so that whatever is returned can be encoded."""
    if field not in record.fields:
        raise Broken(
            f"{record.where}: no field {field!r}; there are {', '.join(record.fields) or 'none'} "
            "(--data.text-field, --data.label-field)"
        )
    value = record.fields[field]
    if field == config.label_field and config.task == "classify":
        return value
    if not isinstance(value, str):
        raise Broken(f"{record.where}: field {field!r} holds {readers.short(value)}, no text")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise Broken(
            f"{record.where}: character {error.start} is half of a surrogate pair, or not UTF-8"
        ) from error
    if size > config.document_limit:
        raise Broken(f"{record.where}: {size} bytes, {readers.limit(config)}")
    return value
