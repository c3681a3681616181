"""Rows as functions of their numbers, and the batches that are made of them."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from train.data import storage
from train.data.config import DataConfig
from train.data.tokenizers import Tokenizer
from train.step.batch import Batch


class Rows(NamedTuple):
    """The rows of a task as pure functions of their numbers."""

    train: Callable[[np.ndarray], Batch]  # int64[N], positions in an endless list -> N rows
    heldout: Callable[[np.ndarray], Batch]  # int64[N] below heldout_count -> N rows with weights
    heldout_count: int  # number of held-out rows


@dataclasses.dataclass(frozen=True)
class Data:
    """The training and held-out data of a run; see `load`."""

    rows: Rows
    batch_size: int
    tokenizer: Tokenizer
    bytes_per_token: float | None
    """UTF-8 bytes of the held-out text per token, for bits per byte; None if it is unknown."""
    fingerprint: str
    """Hash of the tokenizer and of the tokens; a resumed run must find the same one. For token
    files it covers the header, the length and 64 pieces of each file, so a change of tokens between
    the pieces goes unnoticed. All other tokens are hashed completely."""
    class_names: tuple[str, ...] = ()
    """Names of the classes by number; empty where targets are tokens."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids: every token is below it."""
        return self.tokenizer.vocab_size

    @property
    def classes(self) -> int:
        """Number of classes; 0 where targets are tokens."""
        return len(self.class_names)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, int32[T]."""
        return storage.narrow(self.tokenizer.encode(text), np.int32, self.tokenizer.name)

    def prompt(self, text: str) -> np.ndarray:
        """The tokens of a prompt, int32[S]; without a tokenizer, the first held-out tokens."""
        if self.tokenizer.is_text:
            return self.encode(text)
        return self.rows.heldout(np.zeros(1, np.int64)).inputs[0, :8]

    def decode(self, tokens: np.ndarray) -> str:
        """The text of tokens [T]."""
        return self.tokenizer.decode(np.asarray(tokens))

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step, or a slice of its rows: `batch(s, r)` is `batch(s)` cut to rows r.

        Row i of step s is row s B + i of the endless list, so that any process makes any part.

        Raises:
          ValueError: a negative step, or a token outside the vocabulary.
        """
        if step < 0:
            raise ValueError(f"step={step} must not be negative: count from 0")
        return self.rows.train(step * self.batch_size + np.arange(self.batch_size)[rows])

    def heldout(self, batches: int | None = None) -> Iterator[Batch]:
        """All held-out rows, once and in order, in batches of one shape.

        Rows of zeros with weight 0 fill the last batch, so that one compiled program serves all.
        `batches` limits their number: that many batches are taken, evenly spaced.
        """
        starts = np.arange(0, self.rows.heldout_count, self.batch_size)
        if batches is not None and batches < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, batches).round().astype(int)]
        for first in map(int, starts):
            index_N = np.arange(first, min(first + self.batch_size, self.rows.heldout_count))
            missing = self.batch_size - len(index_N)
            yield Batch(*(_fill(leaf, missing) for leaf in self.rows.heldout(index_N)))


def batch_shapes(config: DataConfig, *, batch_size: int, sequence_length: int) -> Batch:
    """The shapes of a training batch as `jax.ShapeDtypeStruct`s; reads no data.

    >>> batch_shapes(DataConfig(), batch_size=2, sequence_length=8).weights is None
    True
    """
    tokens = jax.ShapeDtypeStruct((batch_size, sequence_length), np.int32)
    counts = jax.ShapeDtypeStruct(tokens.shape, np.float32)
    if config.task == "classify":
        classes = jax.ShapeDtypeStruct((batch_size,), np.int32)
        return Batch(
            tokens, classes, jax.ShapeDtypeStruct((batch_size,), np.float32), tokens, tokens
        )
    weighted = config.task == "masked" or config.segments
    return Batch(tokens, tokens, counts if weighted else None, tokens if config.segments else None)


def _fill(leaf: np.ndarray | None, missing: int) -> np.ndarray | None:
    return None if leaf is None else np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))
