"""Several sources in one endless list of rows."""

import functools
import re
from collections.abc import Sequence

import numpy as np

from train.data.rows import Rows
from train.step.batch import Batch

BLOCK = 1000
"""Rows in which each source has exactly its share: weights count in thousandths."""


def parse(source: str) -> list[tuple[str, float]]:
    """The sources of a mixture with their weights, or the one source there is.

    Raises:
      ValueError: a weight is missing, or too small to be met.

    >>> parse("bin:a:0.7,embedded:0.3")
    [('bin:a', 0.7), ('embedded', 0.3)]
    >>> parse("tfds:lm1b:train")
    [('tfds:lm1b:train', 1.0)]
    """
    found = [re.fullmatch(r"(.+):(\d*\.?\d+)", part) for part in source.split(",")]
    if len(found) < 2 or not any(found):
        return [(source, 1.0)]
    parts = [(match[1], float(match[2])) for match in found if match]
    if len(parts) < len(found):
        raise ValueError(
            f"source {source!r}: give each source of a mixture a weight, bin:a:0.7,bin:b:0.3."
        )
    counts_of([weight for _, weight in parts])
    return parts


def counts_of(weights: Sequence[float]) -> np.ndarray:
    """Rows of each source in a block of `BLOCK`, int64[S], by largest remainders.

    >>> counts_of([2, 1]).tolist()
    [667, 333]
    """
    share_S = np.asarray(weights, np.float64) / max(sum(weights), np.finfo(float).tiny) * BLOCK
    count_S = np.floor(share_S).astype(np.int64)
    order_S = np.argsort(count_S - share_S, kind="stable")
    count_S[order_S[: BLOCK - count_S.sum()]] += 1
    if count_S.min() < 1 or min(weights) <= 0:
        raise ValueError(
            f"weights {list(weights)}: each must be above 0 and at least {1 / BLOCK:g} of all."
        )
    return count_S


def mixed_rows(sources: Sequence[Rows], weights: Sequence[float], seed: int) -> Rows:
    """Rows of sources in the proportion of their weights.

    Each block of 1000 rows of the endless list has each source's share exactly, in an order drawn
    from (seed, block), and the rows of a source follow its own endless list: each is visited as if
    it were alone. Held-out rows are those of all sources, one after the other, unweighted.

    Args:
      sources: all with the same leaves.
      weights: one each.
      seed: of the order in a block.
    """
    count_S = counts_of(weights)
    kinds = np.repeat(np.arange(len(sources)), count_S)
    first_S = np.concatenate([[0], np.cumsum(count_S)])
    heldout_first = np.cumsum([0, *(rows.heldout_count for rows in sources)])

    @functools.lru_cache(maxsize=8)
    def block(number: int) -> np.ndarray:
        words = np.random.SeedSequence([seed, number, len(sources)])
        return np.argsort(np.random.PCG64(words).random_raw(BLOCK), kind="stable")

    def train(number_N: np.ndarray) -> Batch:
        block_N, place_N = np.divmod(number_N, BLOCK)
        slot_N = np.zeros_like(number_N)
        for b in np.unique(block_N):
            slot_N[block_N == b] = block(int(b))[place_N[block_N == b]]
        kind_N = kinds[slot_N]
        own_N = block_N * count_S[kind_N] + slot_N - first_S[kind_N]
        return _scatter([rows.train for rows in sources], kind_N, own_N)

    def heldout(index_N: np.ndarray) -> Batch:
        kind_N = np.searchsorted(heldout_first, index_N, side="right") - 1
        parts = [rows.heldout for rows in sources]
        return _scatter(parts, kind_N, index_N - heldout_first[kind_N])

    return Rows(train, heldout, int(heldout_first[-1]))


def _scatter(makers: Sequence, kind_N: np.ndarray, own_N: np.ndarray) -> Batch:
    """Rows made by several, in their places."""
    chosen = [np.flatnonzero(kind_N == kind) for kind in range(len(makers))]
    parts = [make(own_N[at]) for make, at in zip(makers, chosen, strict=True)]
    back_N = np.argsort(np.concatenate(chosen), kind="stable")
    leaves = zip(*parts, strict=True)
    return Batch(*(None if leaf[0] is None else np.concatenate(leaf)[back_N] for leaf in leaves))
