"""Windows of a long text: which tokens each row shows, as a pure function of its number.

Nothing about the data is saved or carried from step to step: a run that resumes at step s, on any
number of processes, asks for step s and gets what the first run would have got.
"""

import functools

import numpy as np

from train.data import storage
from train.data.tokens import Tokens, outside_vocabulary


class Windows:
    """Windows of one text, by number.

    The endless list of rows is epoch after epoch of windows. Each epoch has its own order of the
    windows and its own offset of the first one, both functions of (seed, epoch) alone, and shows
    each of its windows once. Any row costs the same.

    Args:
        tokens: integers [N], N at least `stride + extra`; may be a `np.memmap`.
        stride: tokens from one window to the next.
        extra: tokens of a window beyond its stride: 1 for the target of the last position.
        seed: of the order; not negative.
        vocab_size: every token must be below it.
        where: where the text is from; messages begin with it.
        part: its name, train or heldout, for messages.
        cure: another cure for a text that is too short.

    Raises:
        ValueError: the text is shorter than one window.

    >>> windows = Windows(np.arange(13), stride=4, extra=1, seed=0, vocab_size=13, where="text")
    >>> windows.in_order(np.arange(windows.count)).tolist()
    [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        stride: int,
        extra: int,
        seed: int,
        vocab_size: int,
        where: str,
        part: str = "train",
        cure: str = "",
    ):
        if len(tokens) < stride + extra:
            target = " and the last target" * extra
            raise ValueError(
                f"{where}, {part} part: the text has {len(tokens)} tokens and one window takes "
                f"{stride + extra} (sequence_length={stride}{target}): use a longer text or a "
                f"shorter sequence_length{cure}."
            )
        self._tokens, self._stride, self._extra, self._seed = tokens, stride, extra, seed
        self._vocab_size, self._where = vocab_size, where
        self._order = functools.lru_cache(maxsize=2)(epoch_order)
        self.count = (len(tokens) - extra) // stride

    def shuffled(self, number_N: np.ndarray) -> np.ndarray:
        """Rows of the endless list, int32[N, stride + extra].

        Raises:
            ValueError: a token is outside the vocabulary.
        """
        length, stride, extra = len(self._tokens), self._stride, self._extra
        # One window less than fit leaves a whole window of room for the offset.
        windows = max(1, length // stride - 1)
        offsets = min(stride, length - windows * stride - extra + 1)
        epoch_N, place_N = np.divmod(number_N, windows)
        start_N = np.empty_like(number_N)
        for epoch in set(epoch_N.tolist()):
            here = epoch_N == epoch
            offset, order_W = self._order(self._seed, epoch, windows, offsets)
            start_N[here] = offset + order_W[place_N[here]] * stride
        return self._cut(start_N)

    def in_order(self, index_N: np.ndarray) -> np.ndarray:
        """Windows in the order of the text, int32[N, stride + extra], numbered below `count`.

        Raises:
            ValueError: a token is outside the vocabulary.
        """
        return self._cut(index_N * self._stride)

    def _cut(self, start_N: np.ndarray) -> np.ndarray:
        """Windows from these starts, whose tokens JAX can look up safely."""
        tokens = self._tokens[start_N[:, None] + np.arange(self._stride + self._extra)]
        if tokens.size and tokens.max() >= self._vocab_size:
            raise ValueError(outside_vocabulary(self._tokens, self._vocab_size, self._where))
        return storage.narrow(tokens, np.int32, self._where)


def windows_of(
    tokens: Tokens, stride: int, extra: int, seed: int, vocab_size: int
) -> tuple[Windows, Windows]:
    """Windows of the train part and of the held-out part; arguments as of `Windows`."""
    make = functools.partial(Windows, stride=stride, extra=extra, seed=seed, vocab_size=vocab_size)
    train = make(tokens.train, where=tokens.source)
    cure = f"; or {tokens.heldout_cure}"
    return train, make(tokens.heldout, where=tokens.heldout_source, part="heldout", cure=cure)


def epoch_order(seed: int, epoch: int, windows: int, offsets: int) -> tuple[int, np.ndarray]:
    """Offset of the first window and order of the windows, int64 [W], in one epoch.

    An order takes 8 bytes per window: 80 MB for ten billion tokens in windows of 1024.
    """
    # Raw bits sorted, not Generator.permutation: NumPy guarantees the stream of a bit generator
    # across versions, and a run may be resumed under another version.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    offset = int(bits.random_raw()) % offsets
    return offset, np.argsort(bits.random_raw(windows), kind="stable")


def segments_of(tokens_BxT: np.ndarray, end: int) -> np.ndarray:
    """The number of each token's document within its row, from 0; an end token closes its document.

    >>> segments_of(np.array([[5, 9, 6, 7, 9, 9, 8]]), end=9)
    array([[0, 0, 1, 1, 1, 2, 3]], dtype=int32)
    """
    ends_BxT = (tokens_BxT == end).astype(np.int32)
    return np.cumsum(ends_BxT, axis=1, dtype=np.int32) - ends_BxT
