"""Token files without a header, as nanoGPT writes them: ids alone, no tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.config import DataConfig
from train.data.embedded import split_tail
from train.data.prepare.header import HEADER
from train.data.tokenizers import Tokenizer
from train.data.tokens import Tokens, joined_hash, outside_vocabulary, sampled_hash

_NAMES = ("train.bin", "val.bin")
_PIECE = 2**24  # tokens read at a time


def is_headerless(path: Path) -> bool:
    """Whether a path is a file of ids, or a folder with nanoGPT's two files.

    A folder with `parts` in it is an unfinished one of `prepare`, and does not count.
    """
    names = all((path / name).is_file() for name in _NAMES)
    return path.is_file() or (names and not (path / "parts").exists())


def open_headerless(path: Path, tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    """Memory maps of files without a header.

    Raises:
      ValueError: the files are missing, damaged, or made by another tokenizer.
    """
    if not path.exists():
        raise ValueError(
            f"bin:{path} does not exist: give a folder that `prepare` made. Looked for "
            f"{path.absolute()}."
        )
    if not config.headerless and not is_headerless(path):
        raise ValueError(
            f"{path} has no {HEADER}: give a folder that `prepare` made, or one with train.bin and "
            "val.bin, or state the type of the tokens in a file without header, "
            "--data.headerless uint16."
        )
    train, heldout = memory_maps(path, config)
    evaluated = heldout if len(heldout) else train
    some = np.asarray(evaluated[: 2**20])
    if some.size and some.max() >= tokenizer.vocab_size:
        name = "val.bin" if path.is_dir() and len(heldout) else ""
        raise ValueError(outside_vocabulary(evaluated, tokenizer.vocab_size, str(path / name)))
    ratio = None
    if tokenizer.is_text:
        ratio = len(tokenizer.decode(some).encode()) / max(1, len(some))
    names = _NAMES if path.is_dir() else ("", "")
    source, heldout_source = (str(path / name) for name in names)
    fingerprint = joined_hash(sampled_hash(train), sampled_hash(heldout))
    found = Tokens(train, heldout, ratio, fingerprint, source, heldout_source)
    return found._replace(heldout_cure="give a longer val.bin") if path.is_dir() else found


def memory_maps(path: Path, config: DataConfig) -> list[np.ndarray]:
    """Memory maps of the train and the held-out part."""
    kind = config.headerless
    if path.is_dir():
        return [_memory_map(path / name, kind or _type_of(path / name)) for name in _NAMES]
    return list(split_tail(_memory_map(path, kind or _type_of(path)), config.heldout_fraction))


def vocab_size_of(parts: Sequence[np.ndarray]) -> int:
    """One more than the largest id; reads all tokens, at about one second per gigabyte."""
    pieces = (part[i : i + _PIECE] for part in parts for i in range(0, len(part), _PIECE))
    return 1 + max(int(piece.max()) for piece in pieces)


def _memory_map(path: Path, dtype: str) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy the folder as a whole.")
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % item:
        raise ValueError(
            f"{path}: {size} bytes are not a whole number of {dtype} tokens; the file is cut or "
            "empty."
        )
    return np.memmap(path, dtype, mode="r")


def _type_of(path: Path) -> str:
    """uint16, as nanoGPT writes; uint32 if every second uint16 looks like the half of an id."""
    if path.stat().st_size % 4:
        return "uint16"
    some = np.asarray(_memory_map(path, "uint16")[: 2**16])
    low, high = int(some[::2].max()), int(some[1::2].max())
    wide = len(some) >= 64 and (high == 0 < low or (high < 16 and low > 255))
    return "uint32" if wide else "uint16"
