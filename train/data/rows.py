"""Rows by number, and the batches that are cut from them."""

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
    """A task's rows as pure functions of their numbers."""

    train: Callable[[np.ndarray], Batch]  # int64[N], places in an endless list -> N rows
    heldout: Callable[
        [np.ndarray], Batch
    ]  # int64[N] below `heldout_count` -> N rows, weights included
    heldout_count: int  # held-out rows


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run is trained on and judged by; see `load`."""

    rows: Rows
    batch_size: int
    tokenizer: Tokenizer
    bytes_per_token: float | None
    """UTF-8 bytes of the held-out text a token, for bits a byte; None where the text is unknown."""
    fingerprint: str
    """Hash of the tokenizer and of the tokens: a run that is resumed must find the same. Of token
    files it takes in what their header states, their lengths and 64 pieces of each; a change of
    some tokens between these goes unseen. Other tokens are hashed whole."""
    class_names: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Every token is below it."""
        return self.tokenizer.vocab_size

    @property
    def classes(self) -> int:
        """How many classes the targets name; 0 where they are tokens."""
        return len(self.class_names)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, int32[T]."""
        return storage.narrow(self.tokenizer.encode(text), np.int32, self.tokenizer.name)

    def prompt(self, text: str) -> np.ndarray:
        """The tokens of a text to go on from, int32[S]; of ids alone the first held-out ones."""
        if self.tokenizer.is_text:
            return self.encode(text)
        return self.rows.heldout(np.zeros(1, np.int64)).inputs[0, :8]

    def decode(self, tokens: np.ndarray) -> str:
        """The text of tokens [T]."""
        return self.tokenizer.decode(np.asarray(tokens))

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The rows of a step, or those of them that a process holds: `batch(s, r)` equals every
        leaf of `batch(s)` cut to r.

        Raises:
          ValueError: a negative step, or a token outside the vocabulary.
        """
        if step < 0:
            raise ValueError(f"step={step} must not be negative: count from 0")
        return self.rows.train(step * self.batch_size + np.arange(self.batch_size)[rows])

    def heldout(self, batches: int | None = None) -> Iterator[Batch]:
        """All held-out rows, once and in order, in batches of one shape; rows of zeros, of weight
        0, fill the last. With `batches` that many of these at most, evenly spaced.
        """
        starts = np.arange(0, self.rows.heldout_count, self.batch_size)
        if batches is not None and batches < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, batches).round().astype(int)]
        for first in map(int, starts):
            index_N = np.arange(first, min(first + self.batch_size, self.rows.heldout_count))
            missing = self.batch_size - len(index_N)
            yield Batch(*(_fill(leaf, missing) for leaf in self.rows.heldout(index_N)))


def batch_shapes(config: DataConfig, *, batch_size: int, sequence_length: int) -> Batch:
    """The shapes of a batch to train on, `jax.ShapeDtypeStruct`, before any data is there.

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
