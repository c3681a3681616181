"""Rows of a causal language model: windows of documents laid end to end."""

import numpy as np

from train.data.rows import Rows
from train.data.tasks.windows import segments_of, windows_of
from train.data.tokens import Tokens
from train.step.batch import Batch, next_tokens


def next_token_rows(
    tokens: Tokens, *, sequence_length: int, seed: int, vocab_size: int, end: int | None = None
) -> Rows:
    """Windows of T tokens and one more, the target of the last position.

    Args:
      tokens: the text.
      sequence_length: T.
      seed: of the order of windows.
      vocab_size: every token must be below it.
      end: the token that ends a document: rows then have `segments`, and the prediction after an
        end token has weight 0, since nothing foretells the next document. None for plain rows.

    Raises:
      ValueError: a part is shorter than one window.
    """
    train, heldout = windows_of(tokens, sequence_length, 1, seed, vocab_size)

    def heldout_rows(index_N: np.ndarray) -> Batch:
        rows = _rows(heldout.in_order(index_N), end)
        if rows.weights is not None:
            return rows
        return rows._replace(weights=np.ones(rows.targets.shape, np.float32))

    return Rows(lambda number_N: _rows(train.shuffled(number_N), end), heldout_rows, heldout.count)


def _rows(tokens_NxT1: np.ndarray, end: int | None) -> Batch:
    rows = next_tokens(tokens_NxT1)
    if end is None:
        return rows
    ends_BxT = rows.inputs == end
    return rows._replace(
        weights=(~ends_BxT).astype(np.float32), segments=segments_of(rows.inputs, end)
    )
