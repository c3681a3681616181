"""Writes token files: one part for each source file, then all parts joined."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from models.reading import read_json
from train import files
from train.data import storage
from train.data.config import DataConfig
from train.data.prepare.documents import documents
from train.data.prepare.header import FORMAT, SPLITS
from train.data.prepare.records import SourceFile
from train.data.tokenizers import Tokenizer

_FLUSH = 2**20  # tokens held in memory before they are written
_COUNTS = ("tokens", "bytes", "documents")


def write(
    file: SourceFile,
    fields: tuple[str, ...],
    tokenizer: Tokenizer,
    data: DataConfig,
    stem: Path,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """Writes the part of one source file: a train and a held-out file, and their counts.

    Args:
      file: the source file.
      fields: its text fields, which are joined by line breaks.
      tokenizer: for the text.
      data: how to read the file, and the share that is held out.
      stem: path of the part without suffix; the suffixes are .train, .heldout and .json.
      tick: called with the number of tokens after each write.
    """
    skipped: list[str] = []
    texts = ("\n".join(values) for values in documents(file, data, fields, skipped))
    count: dict[str, Any] = {}

    def write_both(train: Path, heldout: Path) -> None:
        with train.open("wb") as first, heldout.open("wb") as second:
            buffers = [_Buffer(opened, tokenizer) for opened in (first, second)]
            _write_documents(texts, buffers, tokenizer, data.heldout_fraction, tick)
        count.update({s: buffer.count for s, buffer in zip(SPLITS, buffers, strict=True)})

    train, heldout = (stem.with_suffix(f".{split}") for split in SPLITS)
    # Both files are on disk before the counts, which mark the part as done.
    files.replace(
        train, lambda first: files.replace(heldout, lambda second: write_both(first, second))
    )
    count["skipped"] = {"count": len(skipped), "first": skipped[:5]}
    files.replace_text(stem.with_suffix(".json"), json.dumps(count))
    return count


class _Buffer:
    """The tokens of one split that wait to be written, and the counts of all its tokens."""

    def __init__(self, opened: IO[bytes], tokenizer: Tokenizer):
        self._opened, self._tokenizer = opened, tokenizer
        self._waiting: list[np.ndarray] = []
        self._end = np.array([tokenizer.end])
        self.count = dict.fromkeys(_COUNTS, 0)

    def add(self, tokens: np.ndarray, size: int) -> None:
        """Appends a document of `size` bytes and its end token."""
        self._waiting += [tokens, self._end]
        for key, value in zip(_COUNTS, (len(tokens) + 1, size, 1), strict=True):
            self.count[key] += value

    def flush(self) -> None:
        """Writes all waiting tokens."""
        if self._waiting:
            tokens = np.concatenate(self._waiting)
            dtype, name = self._tokenizer.dtype, self._tokenizer.name
            self._opened.write(storage.narrow(tokens, dtype, name).data)
            self._waiting.clear()


def _write_documents(
    texts: Iterable[str],
    buffers: list[_Buffer],
    tokenizer: Tokenizer,
    fraction: float,
    tick: Callable[[int], None],
) -> None:
    held = 0
    for text in texts:
        raw = text.encode()
        tokens = tokenizer.encode(text)
        buffers[held_out(raw, fraction)].add(tokens, len(raw))
        held += len(tokens) + 1
        if held >= _FLUSH:
            _flush(buffers, held, tick)
            held = 0
    _flush(buffers, held, tick)


def _flush(buffers: list[_Buffer], held: int, tick: Callable[[int], None]) -> None:
    for buffer in buffers:
        buffer.flush()
    tick(held)


def held_out(raw: bytes, fraction: float) -> bool:
    """Whether a document is held out: a function of its text, so that copies stay together.

    >>> sum(held_out(str(i).encode(), 0.2) for i in range(1000))
    181
    """
    digest = hashlib.blake2b(raw.strip(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def join_parts(
    folder: Path,
    counts: list[Any],
    tokenizer: Tokenizer,
    data: DataConfig,
    output: Path,
) -> dict[str, Any]:
    """Joins the parts in a folder to train.bin and heldout.bin; returns most of their header.

    Raises:
      ValueError: there are no documents.
    """
    splits = {
        split: {key: sum(c[split][key] for c in counts) for key in _COUNTS} for split in SPLITS
    }
    skipped = {
        "count": sum(c["skipped"]["count"] for c in counts),
        "first": [line for c in counts for line in c["skipped"]["first"]][:5],
    }
    if not sum(split["documents"] for split in splits.values()):
        count, first = skipped["count"], skipped["first"]
        said = f"; skipped {count}, first {first[0]}" if count else ""
        raise ValueError(f"the source has no documents{said}.")
    names = {split: [folder / f"{i:05}.{split}" for i in range(len(counts))] for split in SPLITS}
    # With few documents all may fall into one split: then the end of the text is held out.
    by_tail = data.heldout_fraction > 0 and not all(splits[s]["documents"] for s in SPLITS)
    if by_tail:
        names = {"train": names["train"] + names["heldout"], "heldout": []}
        splits["train"] = {key: sum(splits[s][key] for s in SPLITS) for key in splits["train"]}
    for split in SPLITS:
        _join(names[split], output / f"{split}.bin")
    if by_tail:
        _cut_tail(output, splits, tokenizer.dtype, data.heldout_fraction)
    for split in SPLITS:
        splits[split] |= _inspect(output / f"{split}.bin", tokenizer.dtype)
    return {
        "format": FORMAT,
        "dtype": tokenizer.dtype.name,
        "tokenizer": {
            "name": tokenizer.name,
            "hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "end": tokenizer.end,
        },
        "heldout": "tail" if by_tail else "documents by hash",
        "splits": splits,
        "skipped": skipped,
    }


def _join(pieces: list[Path], target: Path) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as out:
            for path in pieces:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, out, 2**22)

    files.replace(target, write)


def _cut_tail(output: Path, splits: dict[str, Any], dtype: np.dtype, fraction: float) -> None:
    """Moves the end of train.bin to heldout.bin; byte counts are split in proportion to tokens."""
    whole, total = splits["train"], splits["train"]["tokens"]
    tail = round(fraction * total)
    first, path = (total - tail) * dtype.itemsize, output / "train.bin"

    def write(temporary: Path) -> None:
        with path.open("rb") as source, temporary.open("wb") as out:
            source.seek(first)
            shutil.copyfileobj(source, out, 2**22)

    files.replace(output / "heldout.bin", write)
    os.truncate(path, first)
    files.sync(path)
    for split, tokens in (("train", total - tail), ("heldout", tail)):
        size = whole["bytes"] * tokens / total
        splits[split] = {"tokens": tokens, "bytes": size, "documents": whole["documents"]}


def _inspect(path: Path, dtype: np.dtype) -> dict[str, Any]:
    """The hash of a token file and its largest token."""
    digest, largest = hashlib.sha256(), 0
    with path.open("rb") as opened:
        while chunk := opened.read(2**24):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype).max()))
    return {"sha256": digest.hexdigest(), "largest": largest}


def done(stem: Path, dtype: np.dtype) -> dict[str, Any] | None:
    """The counts of a part that is complete; None if the part must be written."""
    try:
        count = read_json(stem.with_suffix(".json"))
        sizes = [stem.with_suffix(f".{split}").stat().st_size for split in SPLITS]
        kept = [count[split]["tokens"] * dtype.itemsize for split in SPLITS]
        whole = all(
            type(number) is int
            for counted in (*(count[split] for split in SPLITS), {"n": count["skipped"]["count"]})
            for number in counted.values()
        )
        lines = count["skipped"]["first"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    shown = isinstance(lines, list) and all(isinstance(line, str) for line in lines)
    return count if whole and shown and sizes == kept else None
