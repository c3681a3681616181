"""The work of `prepare`: files to parts, parts to token files."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train import files
from train.data import sources, storage
from train.data.config import DataConfig
from train.data.prepare.documents import documents
from train.data.prepare.readers import Shard
from train.data.tokenizers import Tokenizer

_SPLITS = ("train", "heldout")
_FLUSH = 2**20  # tokens held before they are written


def write(
    shard: Shard,
    fields: tuple[str, ...],
    tokenizer: Tokenizer,
    data: DataConfig,
    stem: Path,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """Tokens of one file, in a train and a held-out file, and their counts in a third."""
    count: dict[str, Any] = {s: {"tokens": 0, "bytes": 0, "documents": 0} for s in _SPLITS}
    skipped: list[str] = []
    found = documents(shard, data, fields, skipped)
    train, heldout = (stem.with_suffix(f".{split}") for split in _SPLITS)
    # Both are on the disk before the counts, which mark them as done.
    files.replace(
        train,
        lambda first: files.replace(
            heldout,
            lambda second: _write(found, tokenizer, data, (first, second), count, tick),
        ),
    )
    count["skipped"] = {"count": len(skipped), "first": skipped[:5]}
    files.replace_text(stem.with_suffix(".json"), json.dumps(count))
    return count


def _write(
    found: Iterator[tuple[str, ...]],
    tokenizer: Tokenizer,
    data: DataConfig,
    paths: tuple[Path, Path],
    count: dict[str, Any],
    tick: Callable[[int], None],
) -> None:
    waiting: dict[str, list[np.ndarray]] = {split: [] for split in _SPLITS}
    end = np.array([tokenizer.end])
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(path.open("wb")) for path in paths]
        file = dict(zip(_SPLITS, opened, strict=True))

        def flush() -> None:
            for split in _SPLITS:
                if waiting[split]:
                    tokens = np.concatenate(waiting[split])
                    file[split].write(storage.narrow(tokens, tokenizer.dtype, tokenizer.name).data)
                    waiting[split].clear()

        held = 0
        for values in found:
            text = "\n".join(values)
            raw = text.encode()
            split = _SPLITS[held_out(raw, data.heldout_fraction)]
            tokens = tokenizer.encode(text)
            waiting[split] += [tokens, end]
            for key, value in (("tokens", len(tokens) + 1), ("bytes", len(raw)), ("documents", 1)):
                count[split][key] += value
            held += len(tokens) + 1
            if held >= _FLUSH:
                flush()
                tick(held)
                held = 0
        flush()
        tick(held)


def held_out(raw: bytes, fraction: float) -> bool:
    """Whether a document is one to be judged by: a function of its text, so copies agree.

    >>> sum(held_out(str(i).encode(), 0.2) for i in range(1000))
    181
    """
    digest = hashlib.blake2b(raw.strip(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def merge(
    folder: Path,
    counts: list[Any],
    tokenizer: Tokenizer,
    data: DataConfig,
    output: Path,
) -> dict[str, Any]:
    splits = {
        split: {key: sum(c[split][key] for c in counts) for key in ("tokens", "bytes", "documents")}
        for split in _SPLITS
    }
    skipped = {
        "count": sum(c["skipped"]["count"] for c in counts),
        "first": [line for c in counts for line in c["skipped"]["first"]][:5],
    }
    if not sum(split["documents"] for split in splits.values()):
        count, first = skipped["count"], skipped["first"]
        said = f"; skipped {count}, first {first[0]}" if count else ""
        raise ValueError(f"the source has no documents{said}.")
    names = {split: [folder / f"{i:05}.{split}" for i in range(len(counts))] for split in _SPLITS}
    # With few documents all may fall on one side: then the end of the text is held out.
    by_tail = data.heldout_fraction > 0 and not all(splits[s]["documents"] for s in _SPLITS)
    if by_tail:
        names = {"train": names["train"] + names["heldout"], "heldout": []}
        splits["train"] = {key: sum(splits[s][key] for s in _SPLITS) for key in splits["train"]}
    for split in _SPLITS:
        _join(names[split], output / f"{split}.bin")
    if by_tail:
        _cut_tail(output, splits, tokenizer.dtype, data.heldout_fraction)
    for split in _SPLITS:
        splits[split] |= _inspect(output / f"{split}.bin", tokenizer.dtype)
    return {
        "format": sources.FORMAT,
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
    """Moves the end of train.bin; bytes are shared out in proportion to tokens."""
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
    digest, largest = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype).max()))
    return {"sha256": digest.hexdigest(), "largest": largest}


def done(stem: Path, dtype: np.dtype) -> dict[str, Any] | None:
    """The counts of a part that was written whole; None for one that is to be written."""
    from models.reading import read_json  # late: models need more libraries

    try:
        count = read_json(stem.with_suffix(".json"))
        sizes = [stem.with_suffix(f".{split}").stat().st_size for split in _SPLITS]
        kept = [count[split]["tokens"] * dtype.itemsize for split in _SPLITS]
        whole = all(
            type(number) is int
            for counted in (*(count[split] for split in _SPLITS), {"n": count["skipped"]["count"]})
            for number in counted.values()
        )
        lines = count["skipped"]["first"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    shown = isinstance(lines, list) and all(isinstance(line, str) for line in lines)
    return count if whole and shown and sizes == kept else None
