"""Rows of a language model: windows of documents laid end to end."""

import numpy as np

from train.data import sources, storage
from train.data.rows import Rows
from train.data.sources import Tokens
from train.data.tasks.windows import Windows
from train.step.batch import Batch, next_tokens


def next_token_rows(
    tokens: Tokens, *, sequence_length: int, seed: int, vocab_size: int, end: int | None = None
) -> Rows:
    """Windows of T tokens and one more, by `windows.batch`'s law.

    Args:
      tokens: to be cut.
      sequence_length: T.
      seed: of the order.
      vocab_size: every token must be below it.
      end: the token that ends a document: rows then have `segments`, and the token after it, which
        nothing foretells, does not count. None for plain rows, all of which count.

    Raises:
      ValueError: a part shorter than one window.
    """
    train, heldout = windows_of(tokens, sequence_length, 1, seed)

    def row(tokens_BxT1: np.ndarray, where: str, part: np.ndarray) -> Batch:
        rows = next_tokens(checked(tokens_BxT1, vocab_size, where, part))
        if end is None:
            return rows
        ends_BxT = rows.inputs == end
        return rows._replace(
            weights=(~ends_BxT).astype(np.float32), segments=segments_of(rows.inputs, end)
        )

    def weighted(index_N: np.ndarray) -> Batch:
        rows = row(heldout.in_order(index_N), tokens.judge, tokens.heldout)
        if rows.weights is not None:
            return rows
        return rows._replace(weights=np.ones(rows.targets.shape, np.float32))

    return Rows(
        lambda number_N: row(train.shuffled(number_N), tokens.where, tokens.train),
        weighted,
        heldout.count,
    )


def segments_of(tokens_BxT: np.ndarray, end: int) -> np.ndarray:
    """The number of the document that each token of a row is of, from 0; its end is part of it.

    >>> segments_of(np.array([[5, 9, 6, 7, 9, 9, 8]]), end=9)
    array([[0, 0, 1, 1, 1, 2, 3]], dtype=int32)
    """
    ends_BxT = (tokens_BxT == end).astype(np.int32)
    return np.cumsum(ends_BxT, axis=1, dtype=np.int32) - ends_BxT


def windows_of(tokens: Tokens, stride: int, extra: int, seed: int) -> tuple[Windows, Windows]:
    """Windows to train on and to be judged by; the error names which part is too short."""
    found = []
    parts = (
        (tokens.train, f"{tokens.where}, train part", ""),
        (tokens.heldout, f"{tokens.judge}, heldout part", f"; or {tokens.cure}"),
    )
    for part, where, cure in parts:
        try:
            found.append(Windows(part, stride=stride, extra=extra, seed=seed))
        except ValueError as error:
            raise ValueError(f"{where}: {error}{cure}.") from error
    return found[0], found[1]


def checked(tokens: np.ndarray, vocab_size: int, where: str, part: np.ndarray) -> np.ndarray:
    """Tokens as int32, each of which the model has a row for; JAX would read a wrong one.

    Args:
      tokens: of a batch.
      vocab_size: each must be below it.
      where: the place that they are from, for the message.
      part: the tokens that the batch was cut from, in which the first wrong one is looked for.

    Raises:
      ValueError: a token is outside the vocabulary; the message names it and its place.
    """
    if tokens.size and tokens.max() >= vocab_size:
        raise ValueError(sources.outside(part, vocab_size, where))
    return storage.narrow(tokens, np.int32, where)
