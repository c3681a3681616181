"""The documents of a source file: records of any kind, with their fields checked."""

import functools
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from train.data.config import DataConfig
from train.data.prepare import parquet, readers, tfds
from train.data.prepare.records import Broken, Record, SourceFile, over_limit, short

READERS: dict[str, Callable[[SourceFile, DataConfig, tuple[str, ...]], readers.Records]] = {
    "text": readers.text_records,
    "jsonl": readers.jsonl_records,
    "csv": readers.table_records,
    "tsv": functools.partial(readers.table_records, **readers.TSV),
    "parquet": parquet.records,
    "tfds": tfds.records,
}


def documents(
    file: SourceFile, config: DataConfig, fields: tuple[str, ...], skipped: list[str]
) -> Iterator[tuple[Any, ...]]:
    """The values of the given fields, record by record; a text is never empty.

    Args:
      file: to be read.
      config: `broken` decides whether a fault raises or is appended to `skipped`.
      fields: the text fields, then others such as the label.
      skipped: collects the faults.

    Raises:
      Broken: a fault, with file and line.
    """
    try:
        for record in READERS[file.kind](file, config, fields):
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
        fault = error if isinstance(error, Broken) else Broken(f"{file.path}: {error}")
        if config.broken == "error":
            hint = ". Repair or remove it, or skip what is broken: --data.broken skip."
            raise Broken(str(fault).rstrip(".") + hint) from error
        skipped.append(f"{fault}; the rest of the file was not read")


def _value(record: Record, field: str, config: DataConfig) -> Any:
    """One field; a text is checked, so that it can be encoded as UTF-8."""
    if field not in record.fields:
        raise Broken(
            f"{record.where}: no field {field!r}; there are {', '.join(record.fields) or 'none'} "
            "(--data.text-field, --data.label-field)"
        )
    value = record.fields[field]
    if field == config.label_field and config.task == "classify":
        return value
    if not isinstance(value, str):
        raise Broken(f"{record.where}: field {field!r} holds {short(value)}, which is not text")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise Broken(
            f"{record.where}: character {error.start} is half of a surrogate pair, or not UTF-8"
        ) from error
    if size > config.document_limit:
        raise Broken(f"{record.where}: {size} bytes, {over_limit(config)}")
    return value
