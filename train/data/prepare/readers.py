"""Records of text, JSON-lines, CSV and TSV files, which are read line by line or row by row."""

import csv
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from train.data.config import DataConfig
from train.data.prepare.opening import open_bytes
from train.data.prepare.records import Broken, Record, SourceFile, over_limit, short

Records = Iterator[Record | Broken]
TSV: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


def text_records(file: SourceFile, config: DataConfig, fields: tuple[str, ...]) -> Records:
    """The documents of a text file: those between separators, or the whole file."""
    with open_bytes(file.path) as opened:
        for number, raw in enumerate(_pieces(opened, config, file.path), 1):
            where = f"{file.path}, document {number}" if config.separator else str(file.path)
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


def jsonl_records(file: SourceFile, config: DataConfig, fields: tuple[str, ...]) -> Records:
    """The objects of a JSON-lines file, with all their fields."""
    del fields
    with open_bytes(file.path) as opened:
        for number, line in enumerate(_lines(opened, config, file.path), 1):
            where = f"{file.path}, line {number}"
            if isinstance(line, Broken):
                yield line
            elif line.strip():
                yield _json_record(line, where)


def _json_record(line: bytes, where: str) -> Record | Broken:
    try:
        fields = json.loads(decode_utf8(line, where))
        if not isinstance(fields, dict):
            return Broken(f"{where}: {short(fields)} is not a JSON object")
        return Record(where, fields)
    except Broken as fault:
        return fault
    except (ValueError, RecursionError) as error:
        return Broken(f"{where}: broken JSON ({error})")


def table_records(
    file: SourceFile, config: DataConfig, fields: tuple[str, ...], **dialect: Any
) -> Records:
    """The rows of a CSV file, or of another dialect, by the column names in its first row."""
    del fields
    # Lines are limited one by one, but a cell may span many of them.
    csv.field_size_limit(min(config.document_limit, sys.maxsize))
    names: list[str] = []
    faults: list[Broken] = []
    with open_bytes(file.path) as opened:
        lines = _decoded(_lines(opened, config, file.path), file.path, faults)
        rows = csv.reader(lines, **dialect)
        for row in _rows(rows, file.path, faults):
            where = f"{file.path}, line {rows.line_num}"
            if isinstance(row, Broken):
                if not names:  # without column names no row below can be read
                    raise row
                yield row
            elif not names:
                names = row
            elif len(row) != len(names):
                yield Broken(f"{where}: {len(row)} columns, but the first row has {len(names)}")
            else:
                yield Record(where, dict(zip(names, row, strict=True)))


def decode_utf8(raw: bytes | bytearray, where: str) -> str:
    """Bytes as text.

    Raises:
      Broken: they are not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Broken(
            f"{where}: byte {error.start} ({raw[error.start]:#04x}) is not UTF-8; convert the file "
            "from its own encoding, for Latin-1 by iconv -f LATIN1 -t UTF-8"
        ) from error


def _pieces(
    opened: IO[bytes], config: DataConfig, path: Path
) -> Iterator[bytes | bytearray | Broken]:
    """The text between separators; without one, the whole file."""
    separator, buffer, skipping = config.separator.encode(), bytearray(), False
    while chunk := opened.read(2**20):
        buffer += chunk
        if separator:
            *whole, buffer = buffer.split(separator)
            yield from whole[skipping:]
            skipping = skipping and not whole
        if len(buffer) > config.document_limit:
            cure = "split it with --data.separator or raise the limit"
            if not skipping:
                yield Broken(f"{path}: a document has {over_limit(config)}; {cure}")
            if not separator:
                return
            skipping = True
            del buffer[: -len(separator)]  # its end may be the start of a separator
    if not skipping:
        yield buffer


def _lines(opened: IO[bytes], config: DataConfig, path: Path) -> Iterator[bytes | Broken]:
    for number in itertools.count(1):
        line = opened.readline(config.document_limit + 1)
        if not line:
            return
        if len(line) <= config.document_limit:
            yield line
            continue
        yield Broken(f"{path}, line {number}: a line of {over_limit(config)}")
        while line and not line.endswith(b"\n"):
            line = opened.readline(2**20)


def _decoded(lines: Iterator[bytes | Broken], path: Path, faults: list[Broken]) -> Iterator[str]:
    """Lines for `csv.reader`: a broken line adds to `faults`, and something stands in its place."""
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
    """Non-empty rows; a row with broken lines is replaced by its first fault."""
    while True:
        faults.clear()
        first = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            fault = Broken(f"{path}, line {rows.line_num}: {error}")
            if rows.line_num > first:  # inside a cell of several lines, whose end is unknown
                raise fault from error
            yield fault
            continue
        if row is None:
            return
        if faults:
            yield faults[0]
        elif row:
            yield row
