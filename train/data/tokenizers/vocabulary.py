"""The interface of every tokenizer: a vocabulary, encode, decode and the special tokens."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from train import files
from train.data import storage

HOLE = "\ufffd"
"""Decoded form of an id below `vocab_size` that no token has."""
GPT2_FILES = ("encoder.json", "vocab.bpe")
FILES = {".json": "tokenizer.json", ".txt": "vocab.txt"}  # suffix -> name in a folder
_LARGEST = 2**31 - 1  # batches are int32


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its encoder, decoder and special tokens."""

    name: str
    """As the user gave it: bytes, ids:N, or a path."""
    hash: str
    """Hash of everything that decides the tokens of a text."""
    vocab_size: int
    """One more than the largest id, added tokens included; ids that no token has are holes."""
    encode: Callable[[str], np.ndarray]
    """Text -> int[T]. Adds no special tokens, and text that spells one is encoded as text."""
    decode: Callable[[np.ndarray], str]
    """Any ids below `vocab_size` -> text; a hole becomes the replacement character U+FFFD."""
    end: int
    """Ends a document or a sentence: <|endoftext|> or [SEP]; -1 if `is_text` is false."""
    pad: int
    begin: int | None = None
    """[CLS]."""
    mask: int | None = None
    """[MASK]."""
    files: tuple[Path, ...] = ()
    """The files it was read from."""
    is_text: bool = True
    """False for ids whose tokenizer is unknown, so that they cannot be shown as text."""
    rules: int = 1
    """Version of the encoder; a new one makes prepared tokens again, since they may differ."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds every token."""
        return storage.smallest(self.vocab_size)

    def copy(self, folder: Path) -> None:
        """Copies its files into a folder, whose path then names this tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.files:
            name = path.name if len(self.files) > 1 else FILES[path.suffix.lower()]
            files.replace(folder / name, functools.partial(shutil.copyfile, path))


def size_of(ids: Iterable[int], where: str | Path) -> int:
    """The size of a vocabulary with these ids.

    Raises:
      ValueError: one is not an id, or two tokens share one.
    """
    ids = list(ids)
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < _LARGEST]
    if wrong or not ids:
        shown = f"the id {wrong[0]!r:.40}" if wrong else "no tokens"
        raise ValueError(
            f"{where} has {shown}: ids are whole numbers from 0 to {_LARGEST - 1}. Take the file "
            "from its source again."
        )
    if len(set(ids)) < len(ids):
        twice = collections.Counter(ids).most_common(1)[0][0]
        raise ValueError(
            f"{where} has two tokens with the id {twice}, of which only one could be decoded: "
            "give each an id of its own."
        )
    return max(ids) + 1


def total(
    decode: Callable[[list[int]], str], ids: Sequence[int], size: int
) -> Callable[[np.ndarray], str]:
    """A decoder for every id below `size`; those that are not in `ids` become `HOLE`."""
    full = len(ids) == size
    known = np.empty(0, np.int64) if full else np.fromiter(ids, np.int64)

    def decoded(tokens: np.ndarray) -> str:
        tokens = np.asarray(tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            raise ValueError(
                f"tokens reach from {tokens.min()} to {tokens.max()}, the vocabulary from 0 to "
                f"{size - 1}: sample from that many logits only, or decode with the tokenizer that "
                "the model was trained on."
            )
        holes = [] if full else np.flatnonzero(~np.isin(tokens, known))
        if not len(holes):
            return decode(tokens.tolist())
        first, *others = np.split(tokens, holes)
        pieces = [first, *(piece[1:] for piece in others)]
        return HOLE.join(decode(piece.tolist()) if len(piece) else "" for piece in pieces)

    return decoded


@contextlib.contextmanager
def named(where: str | Path, kind: str = "tokenizer that the library can use") -> Iterator[None]:
    """Turns any error of a tokenizer library into a ValueError that names the file."""
    try:
        yield
    except BaseException as error:
        # The library raises plain Exception, and its panics are BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{where} is not a {kind} ({error}). Take the file from its source again."
        ) from error


def hash_of(files: Sequence[Path]) -> str:
    """A hash of the contents of several files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
