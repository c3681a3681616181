"""Rows of several sources in one endless list, in the proportion of their weights."""

import functools
from collections.abc import Sequence

import numpy as np

from train.data.rows import Rows
from train.data.source_string import BLOCK, rows_per_block
from train.step.batch import Batch


def mixed_rows(sources: Sequence[Rows], weights: Sequence[float], seed: int) -> Rows:
    """Rows of several sources in the proportion of their weights.

    Each block of `BLOCK` rows of the endless list has exactly each source's share, in an order that
    is a function of (seed, block). The rows of each source follow its own endless list, as if it
    were alone. The held-out rows of all sources follow one another, unweighted.

    Args:
      sources: rows with the same leaves.
      weights: one for each source.
      seed: of the order within a block.
    """
    mixture = _Mixture(sources, rows_per_block(weights), seed)
    return Rows(mixture.train, mixture.heldout, int(mixture.heldout_first[-1]))


class _Mixture:
    """Maps each row of a mixture to a source and to a row of that source."""

    def __init__(self, sources: Sequence[Rows], count_S: np.ndarray, seed: int):
        self.sources, self.count_S, self.seed = sources, count_S, seed
        self.kinds = np.repeat(np.arange(len(sources)), count_S)
        self.first_S = np.concatenate([[0], np.cumsum(count_S)])
        self.heldout_first = np.cumsum([0, *(rows.heldout_count for rows in sources)])
        self.block = functools.lru_cache(maxsize=8)(_block_order)

    def train(self, number_N: np.ndarray) -> Batch:
        block_N, place_N = np.divmod(number_N, BLOCK)
        slot_N = np.zeros_like(number_N)
        for b in np.unique(block_N):
            order = self.block(self.seed, int(b), len(self.sources))
            slot_N[block_N == b] = order[place_N[block_N == b]]
        count_S, first_S, kind_N = self.count_S, self.first_S, self.kinds[slot_N]
        own_N = block_N * count_S[kind_N] + slot_N - first_S[kind_N]
        return _scatter([rows.train for rows in self.sources], kind_N, own_N)

    def heldout(self, index_N: np.ndarray) -> Batch:
        heldout_first = self.heldout_first
        kind_N = np.searchsorted(heldout_first, index_N, side="right") - 1
        makers = [rows.heldout for rows in self.sources]
        return _scatter(makers, kind_N, index_N - heldout_first[kind_N])


def _block_order(seed: int, number: int, sources: int) -> np.ndarray:
    """The order of the slots in one block: int64 [BLOCK]."""
    words = np.random.SeedSequence([seed, number, sources])
    return np.argsort(np.random.PCG64(words).random_raw(BLOCK), kind="stable")


def _scatter(makers: Sequence, kind_N: np.ndarray, own_N: np.ndarray) -> Batch:
    """Makes each source's rows in one call, and puts all rows back in their order."""
    chosen = [np.flatnonzero(kind_N == kind) for kind in range(len(makers))]
    parts = [make(own_N[at]) for make, at in zip(makers, chosen, strict=True)]
    back_N = np.argsort(np.concatenate(chosen), kind="stable")
    leaves = zip(*parts, strict=True)
    return Batch(*(None if leaf[0] is None else np.concatenate(leaf)[back_N] for leaf in leaves))
