"""Rows of a masked language model, hidden by the law of `models.mask_tokens`, on the host."""

import numpy as np

from train.data import storage
from train.data.rows import Rows
from train.data.sources import Tokens
from train.data.tasks.causal import checked, segments_of, windows_of
from train.data.tokenizers import Tokenizer
from train.step.batch import Batch

_HELDOUT_SEED = 0  # the same tokens are hidden at each evaluation, whatever the run's seed


def masked_rows(
    tokens: Tokens,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    seed: int,
    rate: float,
    segments: bool = False,
) -> Rows:
    """Windows between [CLS] and [SEP], where there are such, with a share of tokens hidden.

    What is hidden is a function of (seed, number of the row), so an epoch hides other tokens than
    the last.

    Args:
      tokens: to be cut.
      tokenizer: its `mask` hides; `begin`, `end` and `pad` are never hidden.
      sequence_length: T, with [CLS] and [SEP].
      seed: of the order and of what is hidden.
      rate: share of tokens to be named.
      segments: also number the documents of a row.

    Raises:
      ValueError: the tokenizer has no mask token, or a part is shorter than one window.
    """
    mask = tokenizer.mask
    if mask is None:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has no [MASK] token, which task=masked hides tokens "
            "by: use bytes or a WordPiece vocab.txt."
        )
    framed = tokenizer.begin is not None
    length = sequence_length - 2 * framed
    train, heldout = windows_of(tokens, length, 0, seed)

    def rows(
        tokens_NxL: np.ndarray, number_N: np.ndarray, seed: int, where: str, part: np.ndarray
    ) -> Batch:
        tokens_NxL = checked(tokens_NxL, tokenizer.vocab_size, where, part)
        if framed:
            tokens_NxL = np.pad(tokens_NxL, [(0, 0), (1, 1)])
            tokens_NxL[:, 0], tokens_NxL[:, -1] = tokenizer.begin, tokenizer.end
        inputs, weights = hide(tokens_NxL, number_N, tokenizer, seed=seed, rate=rate, mask=mask)
        numbers = segments_of(tokens_NxL, tokenizer.end) if segments else None
        return Batch(inputs, tokens_NxL, weights, numbers)

    return Rows(
        lambda number_N: rows(train.shuffled(number_N), number_N, seed, tokens.where, tokens.train),
        lambda index_N: rows(
            heldout.in_order(index_N), index_N, _HELDOUT_SEED, tokens.judge, tokens.heldout
        ),
        heldout.count,
    )


def hide(
    tokens_NxT: np.ndarray,
    number_N: np.ndarray,
    tokenizer: Tokenizer,
    *,
    seed: int,
    rate: float,
    mask: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs int32[N, T], weights float32[N, T]): of the tokens chosen .8 become the mask, .1 any.

    Row i depends on seed and `number_N[i]` alone.
    """
    length = tokens_NxT.shape[1]
    bits_Nx3xT = np.array([_bits(seed, int(n), length) for n in number_N], np.uint64)
    bits_Nx3xT = bits_Nx3xT.reshape(-1, 3, length)
    choose, kind = ((bits_Nx3xT[:, i] >> 11) * 2.0**-53 for i in range(2))
    special = [t for t in (tokenizer.begin, tokenizer.end, tokenizer.pad) if t is not None]
    chosen = (choose < rate) & ~np.isin(tokens_NxT, special)
    random = bits_Nx3xT[:, 2] % np.uint64(tokenizer.vocab_size)
    random = storage.narrow(random, np.int32, tokenizer.name)
    hidden = np.where(kind < 0.8, np.int32(mask), np.where(kind < 0.9, random, tokens_NxT))
    return np.where(chosen, hidden, tokens_NxT), chosen.astype(np.float32)


def _bits(seed: int, number: int, length: int) -> np.ndarray:
    # Raw bits, whose stream NumPy keeps between versions; the words of the key are independent.
    bits = np.random.Philox(key=np.array([seed, number], np.uint64))
    return bits.random_raw(3 * length).reshape(3, length)
