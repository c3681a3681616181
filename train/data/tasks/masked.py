"""Rows of a masked language model, masked on the host by the law of `models.mask_tokens`."""

import dataclasses

import numpy as np

from train.data import storage
from train.data.rows import Rows
from train.data.tasks.windows import segments_of, windows_of
from train.data.tokenizers import Tokenizer
from train.data.tokens import Tokens
from train.step.batch import Batch

_HELDOUT_SEED = 0  # each evaluation masks the same tokens, whatever the run's seed


def masked_rows(
    tokens: Tokens,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    seed: int,
    rate: float,
    segments: bool = False,
) -> Rows:
    """Windows between [CLS] and [SEP], if the tokenizer has them, with a share of tokens masked.

    What is masked is a function of (seed, number of the row), so each epoch masks other tokens.

    Args:
      tokens: the text.
      tokenizer: its `mask` token replaces others; `begin`, `end` and `pad` are never masked.
      sequence_length: T, with [CLS] and [SEP].
      seed: of the order of windows and of what is masked.
      rate: share of tokens to be predicted.
      segments: also number the documents of a row.

    Raises:
      ValueError: the tokenizer has no mask token, or a part is shorter than one window.
    """
    if tokenizer.mask is None:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has no [MASK] token, which task=masked needs: use bytes "
            "or a WordPiece vocab.txt."
        )
    framed = tokenizer.begin is not None
    length = sequence_length - 2 * framed
    train, heldout = windows_of(tokens, length, 0, seed, tokenizer.vocab_size)
    masking = _Masking(tokenizer, tokenizer.mask, rate, segments)
    return Rows(
        lambda number_N: masking.rows(train.shuffled(number_N), number_N, seed),
        lambda index_N: masking.rows(heldout.in_order(index_N), index_N, _HELDOUT_SEED),
        heldout.count,
    )


@dataclasses.dataclass(frozen=True)
class _Masking:
    """How windows become rows."""

    tokenizer: Tokenizer
    mask: int
    rate: float
    segments: bool

    def rows(self, tokens_NxL: np.ndarray, number_N: np.ndarray, seed: int) -> Batch:
        begin, end = self.tokenizer.begin, self.tokenizer.end
        if begin is not None:
            tokens_NxL = np.pad(tokens_NxL, [(0, 0), (1, 1)])
            tokens_NxL[:, 0], tokens_NxL[:, -1] = begin, end
        inputs, weights = hide(
            tokens_NxL, number_N, self.tokenizer, seed=seed, rate=self.rate, mask=self.mask
        )
        numbers = segments_of(tokens_NxL, end) if self.segments else None
        return Batch(inputs, tokens_NxL, weights, numbers)


def hide(
    tokens_NxT: np.ndarray,
    number_N: np.ndarray,
    tokenizer: Tokenizer,
    *,
    seed: int,
    rate: float,
    mask: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks a share of tokens: of the chosen ones, .8 become the mask token and .1 a random token.

    Row i depends on seed and `number_N[i]` alone.

    Returns:
      (inputs int32[N, T], weights float32[N, T]): weights are 1 at the chosen tokens.
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
    # Raw bits, whose stream NumPy guarantees across versions; both words of the key matter.
    bits = np.random.Philox(key=np.array([seed, number], np.uint64))
    return bits.random_raw(3 * length).reshape(3, length)
