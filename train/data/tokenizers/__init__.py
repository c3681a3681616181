"""Tokenizers: bytes, GPT-2's BPE, any tokenizer.json, WordPiece, and ids without a tokenizer."""

import re
from pathlib import Path

import numpy as np

from train.data import embedded, storage
from train.data.tokenizers import gpt2, pretrained
from train.data.tokenizers.vocabulary import FILES, GPT2_FILES, Tokenizer, total

__all__ = ["Tokenizer", "load"]


def load(name: str) -> Tokenizer:
    """The tokenizer of a name or path.

    Raises:
      ValueError: there is no such tokenizer, or its files are damaged.

    >>> load("bytes").encode("né").tolist()
    [110, 195, 169]
    >>> load("ids:50257").decode(np.array([15, 50256]))
    '15 50256'
    """
    if name == "bytes":
        return _bytes()
    if match := re.fullmatch(r"ids:([1-9]\d{0,8})", name):
        return _ids(name, int(match[1]))
    path = Path(name).expanduser()
    if path.is_dir() and (inner := inside(path)):
        return load(str(inner)) if inner != path else gpt2.load(path, name)
    if path.is_file() and path.suffix.lower() == ".json":
        return pretrained.load(path, name)
    if path.is_file() and path.suffix.lower() == ".txt":
        return pretrained.load_wordpiece(path, name)
    what = "holds none of these" if path.is_dir() else "is none of these"
    raise ValueError(
        f"unknown tokenizer {name!r}: give bytes, a folder with {' and '.join(GPT2_FILES)}, the "
        f"path of a tokenizer.json or of a WordPiece vocab.txt; {path.absolute()} {what}."
    )


def inside(folder: Path) -> Path | None:
    """The tokenizer in a folder: the folder itself for GPT-2's two files, or a file in it."""
    if all((folder / file).is_file() for file in GPT2_FILES):
        return folder
    files = (folder / file for file in FILES.values())
    return next((file for file in files if file.is_file()), None)


def _bytes() -> Tokenizer:
    # Control characters in their original roles: NUL pads, 2 and 3 are start and end of text, and
    # 26 is "substitute".
    return Tokenizer(
        "bytes", "bytes", 256, embedded.encode, embedded.decode, end=3, pad=0, begin=2, mask=26
    )


def _ids(name: str, size: int) -> Tokenizer:
    def encode(text: str) -> np.ndarray:
        words = text.split()
        if not all(re.fullmatch(r"\d{1,9}", word) and int(word) < size for word in words):
            raise ValueError(
                f"the text {text!r:.40} is not made of ids from 0 to {size - 1}, and the run has "
                "no tokenizer: give ids with blanks between them, such as '15 7', or train with "
                "the tokenizer that made the ids (--data.tokenizer)."
            )
        return storage.narrow([int(word) for word in words], np.int32, name)

    decode = total(lambda tokens: " ".join(map(str, tokens)), range(size), size)
    return Tokenizer(name, name, size, encode, decode, end=-1, pad=0, is_text=False)
