"""Records out of files: text, JSON lines, CSV, TSV and Parquet.

Files are read in pieces: a line, a CSV row, or a batch of one Parquet row group at a time, and of
Parquet only the columns that are asked for.
"""

import csv
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from train.data.config import DataConfig
from train.data.prepare.opening import Broken, open_bytes


class Shard(NamedTuple):
    """What one thread reads on its own: one file."""

    kind: str  # a key of READERS
    path: Path
    decode: Any = None  # of tfds: bytes -> dict


class Record(NamedTuple):
    """A line, row or example."""

    where: str
    fields: dict[str, Any]


def decode_utf8(raw: bytes | bytearray, where: str) -> str:
    """The text of bytes.

    Raises:
      Broken: they are not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Broken(
            f"{where}: byte {error.start} ({raw[error.start]:#04x}) is not UTF-8; convert it from "
            "the encoding that it has, as by iconv -f LATIN1 -t UTF-8 for Latin-1"
        ) from error


def _text(shard: Shard, config: DataConfig, fields: tuple[str, ...]) -> Iterator[Record | Broken]:
    with open_bytes(shard.path) as file:
        for number, raw in enumerate(_pieces(file, config, shard.path), 1):
            where = f"{shard.path}, document {number}" if config.separator else str(shard.path)
            if isinstance(raw, Broken):
                yield raw
                continue
            try:
                text = decode_utf8(raw, where)
            except Broken as fault:
                yield fault
                continue
            if text.strip():
                yield Record(where, {fields[0]: text})


def _pieces(
    file: IO[bytes], config: DataConfig, path: Path
) -> Iterator[bytes | bytearray | Broken]:
    separator, buffer, skipping = config.separator.encode(), bytearray(), False
    while chunk := file.read(2**20):
        buffer += chunk
        if separator:
            *whole, buffer = buffer.split(separator)
            yield from whole[skipping:]
            skipping = skipping and not whole
        if len(buffer) > config.document_limit:
            cure = "part it with --data.separator or raise the limit"
            if not skipping:
                yield Broken(f"{path}: a document has {limit(config)}; {cure}")
            if not separator:
                return
            skipping = True
            del buffer[: -len(separator)]  # the start of one may be at the end
    if not skipping:
        yield buffer


def _jsonl(shard: Shard, config: DataConfig, fields: tuple[str, ...]) -> Iterator[Record | Broken]:
    del fields
    with open_bytes(shard.path) as file:
        for number, line in enumerate(_lines(file, config, shard.path), 1):
            where = f"{shard.path}, line {number}"
            if isinstance(line, Broken):
                yield line
                continue
            if not line.strip():
                continue
            try:
                fields_of_line = json.loads(decode_utf8(line, where))
                if not isinstance(fields_of_line, dict):
                    raise Broken(f"{where}: {short(fields_of_line)} is no JSON object")
                yield Record(where, fields_of_line)
            except Broken as fault:
                yield fault
            except (ValueError, RecursionError) as error:
                yield Broken(f"{where}: broken JSON ({error})")


def _lines(file: IO[bytes], config: DataConfig, path: Path) -> Iterator[bytes | Broken]:
    for number in itertools.count(1):
        line = file.readline(config.document_limit + 1)
        if not line:
            return
        if len(line) <= config.document_limit:
            yield line
            continue
        yield Broken(f"{path}, line {number}: a line of {limit(config)}")
        while line and not line.endswith(b"\n"):
            line = file.readline(2**20)


def _table(
    shard: Shard, config: DataConfig, fields: tuple[str, ...], **dialect: Any
) -> Iterator[Record | Broken]:
    del fields
    # Lines are limited one by one, but a cell may have many of them.
    csv.field_size_limit(min(config.document_limit, sys.maxsize))
    names: list[str] = []
    faults: list[Broken] = []
    with open_bytes(shard.path) as file:
        lines = _decoded(_lines(file, config, shard.path), shard.path, faults)
        rows = csv.reader(lines, **dialect)
        for row in _rows(rows, shard.path, faults):
            where = f"{shard.path}, line {rows.line_num}"
            if isinstance(row, Broken):
                if not names:  # nothing says what the cells below are
                    raise row
                yield row
            elif not names:
                names = row
            elif len(row) != len(names):
                yield Broken(f"{where}: not {len(names)} columns as the first")
            else:
                yield Record(where, dict(zip(names, row, strict=True)))


def _decoded(lines: Iterator[bytes | Broken], path: Path, faults: list[Broken]) -> Iterator[str]:
    """Lines for `csv`, which never fails: a broken one keeps its place, and adds to `faults`."""
    for number, line in enumerate(lines, 1):
        if isinstance(line, Broken):
            faults.append(line)
            yield "\n"
            continue
        try:
            yield decode_utf8(line, f"{path}, line {number}")
        except Broken as fault:
            faults.append(fault)
            yield line.decode(errors="replace")


def _rows(rows: Any, path: Path, faults: list[Broken]) -> Iterator[list[str] | Broken]:
    """Rows that are not empty; in the place of one that has broken lines, the first fault."""
    while True:
        faults.clear()
        first = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            fault = Broken(f"{path}, line {rows.line_num}: {error}")
            if rows.line_num > first:  # in a cell of several lines, and nothing says where it ends
                raise fault from error
            yield fault
            continue
        if row is None:
            return
        if faults:
            yield faults[0]
        elif row:
            yield row


def _parquet(
    shard: Shard, config: DataConfig, fields: tuple[str, ...]
) -> Iterator[Record | Broken]:
    from train.data.prepare import parquet  # late: it needs an extra

    return parquet.records(shard, config, fields)


def _tfds(shard: Shard, config: DataConfig, fields: tuple[str, ...]) -> Iterator[Record | Broken]:
    from train.data.prepare import tfds

    return tfds.records(shard, config, fields)


READERS: dict[str, Callable[[Shard, DataConfig, tuple[str, ...]], Iterator[Record | Broken]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "csv": _table,
    "tsv": functools.partial(_table, delimiter="\t", quoting=csv.QUOTE_NONE),
    "parquet": _parquet,
    "tfds": _tfds,
}


def short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 40 else shown[:40] + "..."


def limit(config: DataConfig) -> str:
    return f"more than --data.document-limit {config.document_limit}"
