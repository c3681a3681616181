"""Text as byte tokens, and batches that are a pure function of (seed, step).

Nothing about the data is saved or carried from step to step: a run resumed at step s, on any
number of processes, asks for `batch(..., step=s)` and gets what the first run would have got.
"""

import functools
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

HELDOUT_FRACTION = 0.05
_TEXT = Path(__file__).parent / "texts" / "shakespeare.txt.xz"


class Corpus(NamedTuple):
    """Tokens to train on and tokens to be judged by."""

    train: np.ndarray  # uint8 [N]
    heldout: np.ndarray  # uint8 [M], the end of the text


@functools.cache
def shakespeare() -> Corpus:
    """Ten plays of Shakespeare, 1.27 MB, shipped with the trainer (`texts/PROVENANCE.md`).

    Returns:
        The corpus: the last `HELDOUT_FRACTION` of the text, from *The Tempest*, is held out.
        The arrays are read-only, since every caller shares them.

    >>> decode(shakespeare().train[:16])
    'ROMEO AND JULIET'
    """
    tokens = np.frombuffer(lzma.decompress(_TEXT.read_bytes()), np.uint8)
    cut = len(tokens) - round(HELDOUT_FRACTION * len(tokens))
    return Corpus(tokens[:cut], tokens[cut:])


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
    return _gather(tokens, _starts(row_B, len(tokens), sequence_length, seed), sequence_length)


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
            real = _gather(tokens, start_W[first : first + batch_size], sequence_length)
            missing = batch_size - len(real)
            weight_B = np.repeat(np.array([1, 0], np.float32), [len(real), missing])
            yield np.pad(real, [(0, missing), (0, 0)]), weight_B

    return batches()


def to_mesh(
    make_rows: Callable[[slice], np.ndarray],
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """One global array of which each process makes only the rows that its devices hold.

    Args:
        make_rows: rows of the leading axis -> array [rows, *shape[1:]], for example
            `lambda rows: batch(..., rows=rows)`.
        shape: the global shape, (B, T + 1) for a batch.
        sharding: any sharding of that shape.

    Returns:
        The array [*shape], placed.
    """
    # Devices along other mesh axes hold the same rows, and JAX asks once a device.
    make = functools.cache(lambda start, stop: make_rows(slice(start, stop)))

    def shard(index: Any) -> np.ndarray:
        rows, *rest = index
        start, stop, _ = rows.indices(shape[0])
        return make(start, stop)[:, *rest]

    return jax.make_array_from_callback(shape, sharding, shard)


def encode(text: str) -> np.ndarray:
    """The UTF-8 bytes of a text as tokens, int32 [T].

    >>> encode("hé")
    array([104, 195, 169], dtype=int32)
    """
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(tokens: np.ndarray) -> str:
    """The text of byte tokens [T]; bytes that are not UTF-8 become the replacement character.

    Raises:
        ValueError: a token is no byte.

    >>> decode(encode("Exeunt."))
    'Exeunt.'
    """
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= 255:
        raise ValueError(
            f"tokens reach from {tokens.min()} to {tokens.max()}, bytes from 0 to 255: sample from "
            "the first 256 logits, or decode with the tokenizer that the model was trained on"
        )
    return tokens.astype(np.uint8).tobytes().decode(errors="replace")


def _starts(row_B: np.ndarray, length: int, sequence_length: int, seed: int) -> np.ndarray:
    """First token of each row of the endless list: int64 [B]."""
    # One window less than would fit leaves a whole window of room for the offset of the cut.
    windows = max(1, length // sequence_length - 1)
    offsets = min(sequence_length, length - windows * sequence_length)
    epoch_B, place_B = np.divmod(row_B, windows)
    start_B = np.empty_like(row_B)
    for epoch in np.unique(epoch_B):
        here = epoch_B == epoch
        offset, order_W = _epoch(seed, int(epoch), windows, offsets)
        start_B[here] = offset + order_W[place_B[here]] * sequence_length
    return start_B


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, offsets: int) -> tuple[int, np.ndarray]:
    """Offset of the cut and order of the windows, int64 [W], of one epoch."""
    # Raw bits sorted, not Generator.permutation: NumPy keeps the stream of a bit generator
    # between versions, and a run may be resumed under another one.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    offset = int(bits.random_raw()) % offsets
    return offset, np.argsort(bits.random_raw(windows), kind="stable")


def _gather(tokens: np.ndarray, start_B: np.ndarray, sequence_length: int) -> np.ndarray:
    return tokens[start_B[:, None] + np.arange(sequence_length + 1)].astype(np.int32)


def _check(tokens: np.ndarray, batch_size: int, sequence_length: int) -> None:
    if batch_size < 1 or sequence_length < 1:
        raise ValueError(
            f"batch_size={batch_size} and sequence_length={sequence_length} must be at least 1"
        )
    if len(tokens) <= sequence_length:
        raise ValueError(
            f"the text has {len(tokens)} tokens and one window takes {sequence_length + 1} "
            f"(sequence_length={sequence_length} and the last target): "
            "use a longer text or a shorter sequence_length"
        )
