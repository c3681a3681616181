"""Windows of a long text: which tokens each row of each step shows, as a pure function.

Nothing about the data is saved or carried from step to step: a run resumed at step s, on any
number of processes, asks for step s and gets what the first run would have got.
"""

import functools
from collections.abc import Iterator

import numpy as np

from train.data import storage


def batch(
    tokens: np.ndarray,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    step: int,
    rows: slice = slice(None),
) -> np.ndarray:
    """The rows of one training step.

    Row i of step s is row s B + i of an endless list: epoch after epoch of windows of T tokens
    and one more, the target of the last position. Each epoch has its own order of the windows
    and its own offset of the cut, both functions of (seed, epoch) alone, and shows each of its
    windows once. A batch may span two epochs.

    Args:
        tokens: integers [N], N > T; may be a `np.memmap`.
        batch_size: B, rows of the whole step, over all processes.
        sequence_length: T.
        seed: not negative.
        step: not negative; any step costs the same.
        rows: the rows of the step to make: `batch(rows=r)` equals `batch()[r]`.

    Returns:
        int32 [B, T + 1], or the chosen rows of it.

    Raises:
        ValueError: the text is shorter than one window, or a number is out of range.

    >>> batch(np.arange(9), batch_size=2, sequence_length=4, seed=0, step=0).shape
    (2, 5)
    """
    _check(tokens, batch_size, sequence_length)
    if seed < 0 or step < 0:
        raise ValueError(f"seed={seed} and step={step} must not be negative: count from 0")
    row_B = step * batch_size + np.arange(batch_size)[rows]
    start_B = _starts(row_B, len(tokens), sequence_length, seed)
    return storage.narrow(_gather(tokens, start_B, sequence_length + 1), np.int32, "tokens")


def heldout_batches(
    tokens: np.ndarray, *, batch_size: int, sequence_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All windows of a text, once and in order, in batches of one shape.

    Args:
        tokens: integers [M], M > T.
        batch_size: B.
        sequence_length: T. Fewer than T tokens at the end, too few for a window, are left out.

    Returns:
        An iterator of (rows int32 [B, T + 1], weights float32 [B]); weight 0 marks the rows of
        zeros that fill the last batch, so that one compiled program serves all batches.

    Raises:
        ValueError: at the call, as `batch` does.

    >>> batches = heldout_batches(np.arange(13), batch_size=2, sequence_length=4)
    >>> [weights.tolist() for _, weights in batches]
    [[1.0, 1.0], [1.0, 0.0]]
    """
    _check(tokens, batch_size, sequence_length)
    start_W = np.arange(0, len(tokens) - sequence_length, sequence_length)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(start_W), batch_size):
            real = _gather(tokens, start_W[first : first + batch_size], sequence_length + 1)
            missing = batch_size - len(real)
            weight_B = np.repeat(np.array([1, 0], np.float32), [len(real), missing])
            rows = storage.narrow(real, np.int32, "tokens")
            yield np.pad(rows, [(0, missing), (0, 0)]), weight_B

    return batches()


class Windows:
    """Windows of one text, by number.

    Args:
        tokens: integers [N], N at least `stride + extra`; may be a `np.memmap`.
        stride: tokens from one window to the next.
        extra: tokens of a window beyond its stride: 1 for the target of the last position.
        seed: of the order; not negative.

    >>> windows = Windows(np.arange(13), stride=4, extra=1, seed=0)
    >>> windows.in_order(np.arange(windows.count)).tolist()
    [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
    """

    def __init__(self, tokens: np.ndarray, *, stride: int, extra: int, seed: int):
        _check(tokens, 1, stride, extra)
        self._tokens, self._stride, self._extra, self._seed = tokens, stride, extra, seed
        self._epoch = functools.lru_cache(maxsize=2)(epoch_order)
        self.count = (len(tokens) - extra) // stride

    def shuffled(self, row_N: np.ndarray) -> np.ndarray:
        """Rows of the endless list, [N, stride + extra] of the text's type; see `batch`."""
        length = len(self._tokens)
        start_N = _starts(row_N, length, self._stride, self._seed, self._extra, self._epoch)
        return _gather(self._tokens, start_N, self._stride + self._extra)

    def in_order(self, index_N: np.ndarray) -> np.ndarray:
        """Windows from the first token on, numbered below `count`."""
        return _gather(self._tokens, index_N * self._stride, self._stride + self._extra)


def epoch_order(seed: int, epoch: int, windows: int, offsets: int) -> tuple[int, np.ndarray]:
    """Offset of the cut and order of the windows, int64 [W], of one epoch.

    An order takes 8 bytes a window: 80 MB for ten billion tokens in windows of 1024.
    """
    # Raw bits sorted, not Generator.permutation: NumPy keeps the stream of a bit generator
    # between versions, and a run may be resumed under another one.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    offset = int(bits.random_raw()) % offsets
    return offset, np.argsort(bits.random_raw(windows), kind="stable")


_epoch = functools.lru_cache(maxsize=4)(epoch_order)


def _starts(
    row_B: np.ndarray, length: int, stride: int, seed: int, extra: int = 1, epoch_of=_epoch
) -> np.ndarray:
    """First token of each row of the endless list: int64 [B]."""
    # One window less than would fit leaves a whole window of room for the offset of the cut.
    windows = max(1, length // stride - 1)
    offsets = min(stride, length - windows * stride - extra + 1)
    epoch_B, place_B = np.divmod(row_B, windows)
    start_B = np.empty_like(row_B)
    for epoch in set(epoch_B.tolist()):
        here = epoch_B == epoch
        offset, order_W = epoch_of(seed, epoch, windows, offsets)
        start_B[here] = offset + order_W[place_B[here]] * stride
    return start_B


def _gather(tokens: np.ndarray, start_B: np.ndarray, length: int) -> np.ndarray:
    return tokens[start_B[:, None] + np.arange(length)]


def _check(tokens: np.ndarray, batch_size: int, sequence_length: int, extra: int = 1) -> None:
    if batch_size < 1 or sequence_length < 1:
        raise ValueError(
            f"batch_size={batch_size} and sequence_length={sequence_length} must be at least 1"
        )
    if len(tokens) < sequence_length + extra:
        target = " and the last target" * extra
        raise ValueError(
            f"the text has {len(tokens)} tokens and one window takes {sequence_length + extra} "
            f"(sequence_length={sequence_length}{target}): "
            "use a longer text or a shorter sequence_length"
        )
