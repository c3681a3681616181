"""Records of a Parquet file, of which no more is unpacked than its limits allow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.config import DataConfig
from train.data.opening import Broken, open_plain
from train.data.readers import Record, Shard, limit
from train.extras import need

ROW_GROUP_LIMIT = 2**32
"""Bytes of text that the columns of one row group may hold."""
_ROWS = 256  # read at a time


def records(shard: Shard, config: DataConfig, fields: tuple[str, ...]) -> Iterator[Record | Broken]:
    """The rows of a file, one batch of one row group at a time, of the columns asked for."""
    arrow = need("pyarrow", "data", "a Parquet file")
    parquet = need("pyarrow.parquet", "data", "a Parquet file")
    columns = list(dict.fromkeys(fields))
    with open_plain(shard.path) as file:
        if file.read(4) != b"PAR1":
            raise Broken(f"{shard.path}: not a whole Parquet file, which begins with PAR1")
    try:
        with parquet.ParquetFile(shard.path) as file:
            strings = _check_columns(file.schema_arrow, columns, shard.path)
        # Strings that a page states once stay so in memory, however many rows repeat them.
        with parquet.ParquetFile(shard.path, read_dictionary=strings) as file:
            for group in range(file.num_row_groups):
                where = f"{shard.path}, row group {group}"
                _check_size(file, group, columns, where)
                row = 0
                for batch in file.iter_batches(_ROWS, [group], columns):
                    yield from _rows(batch, row, where, config)
                    row += len(batch)
    except (arrow.ArrowException, KeyError) as error:
        raise Broken(f"{shard.path}: not a whole Parquet file ({error})") from error


def _check_columns(schema: Any, columns: list[str], path: Path) -> list[str]:
    """Those of the columns that hold strings; a nested one would unpack without a limit."""
    types = need("pyarrow.types", "data", "a Parquet file")
    there = schema.names
    if missing := [field for field in columns if field not in there]:
        raise Broken(
            f"{path}: no column {missing[0]!r}; there are {', '.join(there)} "
            f"(--data.text-field, --data.label-field)"
        )
    if twice := [field for field in columns if there.count(field) > 1]:
        raise Broken(f"{path}: two columns are called {twice[0]!r}")
    for name in columns:
        if types.is_nested(schema.field(name).type):
            raise Broken(f"{path}: column {name!r} holds {schema.field(name).type}, no text")
    return [n for n in columns if _is_bytes(types, schema.field(n).type)]


def _is_bytes(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind)


def _check_size(file: Any, group: int, columns: list[str], where: str) -> None:
    """Bounds what the rows hold, which a dictionary makes any number of times what is stored."""
    about = file.metadata.row_group(group)
    chunks = [about.column(i) for i in range(about.num_columns)]
    stored = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema in columns)
    size = stored
    if stored <= ROW_GROUP_LIMIT < stored * about.num_rows:
        size = sum(
            sum(map(_bytes_in, batch.columns))
            for batch in file.iter_batches(2**16, [group], columns)
        )
    if size > ROW_GROUP_LIMIT:
        raise Broken(
            f"{where}: {size} bytes unpacked, more than {ROW_GROUP_LIMIT}; write it again with "
            "smaller row groups"
        )


def _bytes_in(column: Any) -> int:
    if not hasattr(column, "dictionary"):
        return column.nbytes
    compute = need("pyarrow.compute", "data", "a Parquet file")
    return compute.sum(_lengths(column)).as_py() or 0


def _lengths(column: Any) -> Any:
    """Bytes of each row, of which none is unpacked."""
    compute = need("pyarrow.compute", "data", "a Parquet file")
    lengths = compute.binary_length(column.dictionary).cast("int64")
    return compute.take(lengths, column.indices)


def _rows(batch: Any, first: int, where: str, config: DataConfig) -> Iterator[Record | Broken]:
    cells = [_cells(column, config) for column in batch.columns]
    for row, values in enumerate(zip(*cells, strict=True), first):
        here = f"{where}, row {row}"
        faults = [value for value in values if isinstance(value, Broken)]
        if faults:
            yield Broken(f"{here}: {faults[0]}")
        else:
            yield Record(here, dict(zip(batch.schema.names, values, strict=True)))


def _cells(column: Any, config: DataConfig) -> Iterator[Any]:
    """Values one by one; too long a one stays packed."""
    if not hasattr(column, "dictionary"):
        yield from column.to_pylist()
        return
    words, lengths = column.dictionary, _lengths(column).to_pylist()
    for place, length in zip(column.indices.to_pylist(), lengths, strict=True):
        if place is None or length is None:
            yield None
        elif length > config.document_limit:
            yield Broken(f"{length} bytes, {limit(config)}")
        else:
            yield _text(words[place])


def _text(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return Broken(f"byte {error.start} is not UTF-8")


