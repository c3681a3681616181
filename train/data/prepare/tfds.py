"""Data sets that tensorflow_datasets prepared, read without TensorFlow and without a network."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.config import DataConfig
from train.data.prepare.opening import Broken, open_plain
from train.data.prepare.readers import Record, Shard
from train.extras import need

TEXT = {
    "c4": "text",
    "glue/ax": "premise,hypothesis",
    "glue/cola": "sentence",
    "glue/mnli": "premise,hypothesis",
    "glue/mrpc": "sentence1,sentence2",
    "glue/qnli": "question,sentence",
    "glue/qqp": "question1,question2",
    "glue/rte": "sentence1,sentence2",
    "glue/sst2": "sentence",
    "glue/stsb": "sentence1,sentence2",
    "glue/wnli": "sentence1,sentence2",
    "imdb_reviews": "text",
    "lm1b": "text",
    "squad": "context",
    "trivia_qa": "question",
    "wiki40b": "text",
}
"""The features that are text, where --data.text-field does not say."""


def shards(name: str, config: DataConfig) -> list[Shard]:
    """The files of NAME[/CONFIG][:SPLIT], by default of its train split.

    Raises:
      ValueError: it is not there, has no such split, or is of a format that cannot be read.
    """
    name, _, split = name.partition(":")
    builder = _builder(name, config)
    split, info = split or "train", builder.info
    if split not in info.splits:
        raise ValueError(f"tfds:{name} has no split {split!r}; it has {', '.join(info.splits)}.")
    kind = info.file_format.value
    if kind not in ("tfrecord", "array_record"):
        raise ValueError(
            f"tfds:{name} is kept as {kind}; prepare it as tfrecord or array_record "
            "(tfds build --file_format array_record)."
        )
    paths = [Path(path) for path in info.splits[split].filepaths]
    if missing := [path for path in paths if not path.is_file()]:
        raise Broken(f"{missing[0]} is missing: tfds:{name} was not copied as a whole")
    return [Shard("tfds", path, info.features.deserialize_example_np) for path in paths]


def text_field(name: str) -> str:
    """The features that are text, with commas between them.

    >>> text_field("glue/mrpc:validation")
    'sentence1,sentence2'
    """
    name = name.partition(":")[0]
    return TEXT.get(name) or TEXT.get(name.partition("/")[0], "text")


def records(shard: Shard, config: DataConfig, fields: tuple[str, ...]) -> Iterator[Record | Broken]:
    """The examples of a file."""
    open_plain(shard.path).close()
    packed = _tfrecord if ".tfrecord" in shard.path.name else _array_record
    for number, raw in enumerate(packed(shard.path, config.document_limit)):
        where = f"{shard.path}, example {number}"
        try:
            example = shard.decode(raw)
        except Exception as error:  # protobuf's errors have no common class of their own
            yield Broken(f"{where}: {error}")
            continue
        yield Record(where, {k: _plain(v) if k in fields else v for k, v in example.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return value.item() if getattr(value, "shape", None) == () else value


def _builder(name: str, config: DataConfig) -> Any:
    need("importlib_resources", "tfds", f"tfds:{name}")
    core = need("tensorflow_datasets.core", "tfds", f"tfds:{name}")
    folder = Path(os.environ.get("TFDS_DATA_DIR") or config.tfds_folder).expanduser()
    try:
        dataset, _, variant = name.partition("/")
        options = {"config": variant} if variant else {}
        return core.read_only_builder.builder_from_files(dataset, data_dir=str(folder), **options)
    except core.registered.DatasetNotFoundError as error:
        if config.download:
            return _download(name, folder)
        raise ValueError(
            f"tfds:{name} is not in {folder}. Copy it there as prepared elsewhere, say where it is "
            "(--data.tfds-folder, TFDS_DATA_DIR), or allow to fetch it: --data.download."
        ) from error


def _download(name: str, folder: Path) -> Any:
    tfds = need("tensorflow_datasets", "tfds", f"tfds:{name}")
    need("tensorflow_datasets.text", "tfds", f"tfds:{name}")  # registers glue, c4 and wiki40b
    try:
        builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()  # shows bars of its own
    except (
        ImportError,
        OSError,
        AssertionError,
        tfds.core.registered.DatasetNotFoundError,
    ) as error:
        raise ValueError(
            f"tfds:{name} could not be fetched into {folder} ({type(error).__name__}: {error}). "
            "Some need TensorFlow, or files of your own, to be prepared: do it elsewhere and copy "
            "the folder."
        ) from error
    return builder


def _tfrecord(path: Path, limit: int) -> Iterator[bytes]:
    # Each record: its length (uint64), a checksum of it, the bytes, a checksum of them. Checksums
    # are not verified: that needs TensorFlow or a table walk a byte.
    with open_plain(path) as file:
        number = 0
        while head := file.read(12):
            (length,) = struct.unpack("<Q", head[:8]) if len(head) == 12 else (limit + 1,)
            if length > limit:
                raise Broken(f"{path}, example {number}: a length of {length}, cut or corrupt")
            raw = file.read(length + 4)
            if len(raw) < length + 4:
                raise Broken(f"{path}, example {number}: the file ends within it")
            yield raw[:length]
            number += 1


def _array_record(path: Path, limit: int) -> Iterator[bytes]:
    del limit  # the reader unpacks in chunks of its own
    module = need("array_record.python.array_record_module", "tfds", str(path))
    try:
        reader = module.ArrayRecordReader(str(path))
        for _ in range(reader.num_records()):
            yield reader.read()
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise Broken(f"{path}: no whole array_record file ({error})") from error
