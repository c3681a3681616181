"""Files of ids alone, as nanoGPT writes them: no header, no tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.config import DataConfig
from train.data.embedded import cut

_NAMES = ("train.bin", "val.bin")
_PIECE = 2**24  # tokens that are looked at in one go


def is_bare(path: Path) -> bool:
    """Whether a path has ids alone: a file, or a folder with nanoGPT's two.

    A folder that `prepare` did not finish has `parts` in it, and is none.
    """
    names = all((path / name).is_file() for name in _NAMES)
    return path.is_file() or (names and not (path / "parts").exists())


def parts(path: Path, config: DataConfig) -> list[np.ndarray]:
    """Memory maps of what is trained on and of what is held out."""
    kind = config.headerless
    if path.is_dir():
        return [memory_map(path / name, kind or _kind_of(path / name)) for name in _NAMES]
    return list(cut(memory_map(path, kind or _kind_of(path)), config.heldout_fraction))


def memory_map(path: Path, dtype: str) -> np.ndarray:
    """The tokens of a file without a header.

    Raises:
      ValueError: its size is not that of tokens.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy the folder as a whole.")
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % item:
        raise ValueError(f"{path}: {size} bytes are no {dtype} tokens; the file is cut or empty.")
    return np.memmap(path, dtype, mode="r")


def vocabulary(tokens: Sequence[np.ndarray]) -> int:
    """The largest id and one, of all tokens, which are read for it: about a second a gigabyte."""
    pieces = (part[i : i + _PIECE] for part in tokens for i in range(0, len(part), _PIECE))
    return 1 + max(int(piece.max()) for piece in pieces)


def first_outside(tokens: np.ndarray, vocab_size: int) -> int | None:
    """The place of the first token that a vocabulary lacks."""
    for start in range(0, len(tokens), _PIECE):
        wrong = tokens[start : start + _PIECE] >= vocab_size
        if wrong.any():
            return start + int(np.argmax(wrong))
    return None


def _kind_of(path: Path) -> str:
    """uint16, as nanoGPT writes, or uint32 where every second uint16 is the high half of an id."""
    if path.stat().st_size % 4:
        return "uint16"
    some = np.asarray(memory_map(path, "uint16")[: 2**16])
    low, high = int(some[::2].max()), int(some[1::2].max())
    wide = len(some) >= 64 and (high == 0 < low or (high < 16 and low > 255))
    return "uint32" if wide else "uint16"
