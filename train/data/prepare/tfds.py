"""Reads data sets that tensorflow_datasets prepared, without TensorFlow and without a network."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.config import DataConfig
from train.data.prepare.opening import open_plain
from train.data.prepare.records import Broken, Record, SourceFile
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
"""The text features of known data sets, used unless --data.text-field is given."""


def source_files(name: str, config: DataConfig) -> list[SourceFile]:
    """The files of NAME[/CONFIG][:SPLIT]; the default split is train.

    Raises:
      ValueError: the data set or the split does not exist, or its format cannot be read.
    """
    name, _, split = name.partition(":")
    builder = _builder(name, config)
    split, info = split or "train", builder.info
    if split not in info.splits:
        raise ValueError(f"tfds:{name} has no split {split!r}; it has {', '.join(info.splits)}.")
    kind = info.file_format.value
    if kind not in ("tfrecord", "array_record"):
        raise ValueError(
            f"tfds:{name} is stored as {kind}; prepare it as tfrecord or array_record "
            "(tfds build --file_format array_record)."
        )
    paths = [Path(path) for path in info.splits[split].filepaths]
    if missing := [path for path in paths if not path.is_file()]:
        raise Broken(f"{missing[0]} is missing: tfds:{name} was not copied as a whole")
    return [SourceFile("tfds", path, info.features.deserialize_example_np) for path in paths]


def text_field(name: str) -> str:
    """The text features of a data set, with commas between them.

    >>> text_field("glue/mrpc:validation")
    'sentence1,sentence2'
    """
    name = name.partition(":")[0]
    return TEXT.get(name) or TEXT.get(name.partition("/")[0], "text")


def records(
    file: SourceFile, config: DataConfig, fields: tuple[str, ...]
) -> Iterator[Record | Broken]:
    """The examples of a file."""
    open_plain(file.path).close()
    unpack = _tfrecord if ".tfrecord" in file.path.name else _array_record
    for number, raw in enumerate(unpack(file.path, config.document_limit)):
        where = f"{file.path}, example {number}"
        try:
            example = file.decode(raw)
        except Exception as error:  # the errors of protobuf have no common class
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
            f"tfds:{name} is not in {folder}. Copy it there from where it was prepared, give its "
            "folder (--data.tfds-folder, TFDS_DATA_DIR), or allow the download: --data.download."
        ) from error


def _download(name: str, folder: Path) -> Any:
    tfds = need("tensorflow_datasets", "tfds", f"tfds:{name}")
    need("tensorflow_datasets.text", "tfds", f"tfds:{name}")  # registers glue, c4 and wiki40b
    try:
        builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()  # shows its own progress bars
    except (
        ImportError,
        OSError,
        AssertionError,
        tfds.core.registered.DatasetNotFoundError,
    ) as error:
        raise ValueError(
            f"tfds:{name} could not be downloaded into {folder} ({type(error).__name__}: {error}). "
            "Some data sets need TensorFlow, or files that you supply, to be prepared: do that "
            "elsewhere and copy the folder."
        ) from error
    return builder


def _tfrecord(path: Path, limit: int) -> Iterator[bytes]:
    # A record is its length (uint64), a checksum of the length, the bytes, and a checksum of the
    # bytes. Checksums are not verified: in Python that would take a table look-up for each byte.
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
    del limit  # the library unpacks in its own chunks
    module = need("array_record.python.array_record_module", "tfds", str(path))
    try:
        reader = module.ArrayRecordReader(str(path))
        for _ in range(reader.num_records()):
            yield reader.read()
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise Broken(f"{path}: not a whole array_record file ({error})") from error
