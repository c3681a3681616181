"""Records of a Parquet file; limits bound the memory that is unpacked at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.config import DataConfig
from train.data.prepare.opening import open_plain
from train.data.prepare.records import Broken, Record, SourceFile, over_limit
from train.extras import need

ROW_GROUP_LIMIT = 2**32
"""Largest size in bytes of the text in the columns of one row group."""
_ROWS = 256  # rows read at a time
_DICTIONARY = 2**24  # bytes of a dictionary that are always allowed; writers stop at 2**20
_PACKING = 1000  # a higher compression ratio is suspect: text has 2 to 10


def records(
    file: SourceFile, config: DataConfig, fields: tuple[str, ...]
) -> Iterator[Record | Broken]:
    """The rows of a file, with the given columns only, one batch of one row group at a time."""
    path = file.path
    arrow = need("pyarrow", "data", "a Parquet file")
    parquet = need("pyarrow.parquet", "data", "a Parquet file")
    columns = list(dict.fromkeys(fields))
    with open_plain(path) as opened:
        if opened.read(4) != b"PAR1":
            raise Broken(f"{path}: not a whole Parquet file, which begins with PAR1")
    try:
        with parquet.ParquetFile(path) as opened:
            _check_columns(opened.schema_arrow, columns, path)
            for group in range(opened.num_row_groups):
                yield from _group(opened, group, columns, path, config)
    except (arrow.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise Broken(f"{path}: not a whole Parquet file ({error})") from error


def _check_columns(schema: Any, columns: list[str], path: Path) -> None:
    """Refuses missing and nested columns: one row of a nested column unpacks without a limit."""
    types = need("pyarrow.types", "data", "a Parquet file")
    there = schema.names
    if missing := [field for field in columns if field not in there]:
        raise Broken(
            f"{path}: no column {missing[0]!r}; there are {', '.join(there)}: choose one with "
            "--data.text-field or --data.label-field"
        )
    for name in columns:
        if there.count(name) > 1:
            raise Broken(f"{path}: {there.count(name)} columns are called {name!r}")
        if types.is_nested(schema.field(name).type):
            raise Broken(f"{path}: column {name!r} holds {schema.field(name).type}, not text")


def _group(
    file: Any, group: int, columns: list[str], path: Path, config: DataConfig
) -> Iterator[Record | Broken]:
    where, row, size = f"{path}, row group {group}", 0, 0
    rows = _check_size(file, group, columns, path, config.document_limit)
    for batch in file.iter_batches(rows, [group], columns):
        size += sum(sum(_lengths(column)) for column in batch.columns)
        _within(size, where)
        cells = [_cells(column, config) for column in batch.columns]
        for row, values in enumerate(zip(*cells, strict=True), row):  # noqa: B020
            fault = next((value for value in values if isinstance(value, Broken)), None)
            here = f"{where}, row {row}"
            fields = dict(zip(batch.schema.names, values, strict=True))
            yield Record(here, fields) if fault is None else Broken(f"{here}: {fault}")
        row += 1


def _check_size(file: Any, group: int, columns: list[str], path: Path, limit: int) -> int:
    """Checks the stated sizes of a row group; returns how many rows to read at a time.

    That many rows hold about `limit` bytes at most. Every row may repeat a value of the dictionary
    page, so a few kilobytes on disk can stand for any number of gigabytes.
    """
    about, where = file.metadata.row_group(group), f"{path}, row group {group}"
    chunks = [about.column(i) for i in range(about.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema in columns]
    stored = sum(chunk.total_uncompressed_size for chunk in chunks)
    _within(stored, where)
    packed = sum(chunk.total_compressed_size for chunk in chunks)
    if stored > max(limit, _PACKING * packed):  # a page is unpacked whole, however large it is
        raise Broken(
            f"{where}: {packed} bytes that unpack to {stored}, a ratio that text never has; if the "
            "file is sound, write it again with smaller row groups"
        )
    repeated = sum(_dictionary_bytes(path, chunk) for chunk in chunks)
    if repeated > max(limit // 4, _DICTIONARY):  # unpacking takes six times its size
        raise Broken(
            f"{where}: a dictionary of {repeated} bytes, more than a quarter of "
            f"--data.document-limit {limit}; raise the limit, or write the file again without "
            "dictionaries"
        )
    mean = stored // max(about.num_rows, 1)
    rows = min(_ROWS, max(1, limit // (4 * max(repeated, mean, 1))))  # held up to four times
    if repeated * about.num_rows > ROW_GROUP_LIMIT > _PACKING * packed:
        size = 0
        for batch in file.iter_batches(rows, [group], columns):
            size += sum(sum(_lengths(column)) for column in batch.columns)
            _within(size, where)
    return rows


def _within(size: int, where: str) -> None:
    if size > ROW_GROUP_LIMIT:
        raise Broken(
            f"{where}: at least {size} bytes when unpacked, above {ROW_GROUP_LIMIT}; write the "
            "file again with smaller row groups"
        )


def _dictionary_bytes(path: Path, chunk: Any) -> int:
    """Size in bytes that a column's dictionary page states in its header; bounds each value."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    with path.open("rb") as file:
        file.seek(max(start, 0))
        head = file.read(16)
    kind, rest = _number(head)
    size, _ = _number(rest)
    return size if kind == 2 else 0  # Thrift: type (DICTIONARY_PAGE is 2), uncompressed size


def _number(head: bytes) -> tuple[int, bytes]:
    """An i32 field in Thrift's compact encoding and the bytes after it; 0 for anything else."""
    value = 0
    for i, byte in enumerate(head[1:6]):
        value |= (byte & 127) << 7 * i
        if byte < 128 and head[0] == 0x15:
            return (value >> 1) ^ -(value & 1), head[i + 2 :]
    return 0, b""


def _lengths(column: Any) -> list[int]:
    """Size in bytes of each row's text; 0 for numbers, whose memory the file size bounds."""
    compute = need("pyarrow.compute", "data", "a Parquet file")
    types = need("pyarrow.types", "data", "a Parquet file")
    if types.is_dictionary(column.type):
        lengths = _lengths(column.dictionary)
        return [0 if place is None else lengths[place] for place in column.indices.to_pylist()]
    strings = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(check(column.type) for check in strings):
        return [0] * len(column)
    return compute.fill_null(compute.binary_length(column), 0).to_pylist()


def _cells(column: Any, config: DataConfig) -> list[Any]:
    """The values of a column; a fault stands in place of a value that cannot be read."""
    lengths = _lengths(column)
    try:
        if max(lengths, default=0) <= config.document_limit:
            return column.to_pylist()
    except UnicodeDecodeError:
        pass  # the row with the fault is found below
    return [_cell(column[i], length, config) for i, length in enumerate(lengths)]


def _cell(value: Any, length: int, config: DataConfig) -> Any:
    if length > config.document_limit:
        return Broken(f"{length} bytes, {over_limit(config)}")
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return Broken(f"byte {error.start} is not UTF-8")
