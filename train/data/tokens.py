"""The tokens of one source, in a train and a held-out part."""

import hashlib
from typing import NamedTuple

import numpy as np

from train.data.prepare.header import HEADER

_PIECE = 2**24  # tokens searched at a time


class Tokens(NamedTuple):
    """The tokens of one source, in a train and a held-out part."""

    train: np.ndarray  # unsigned [N], often a memory map
    heldout: np.ndarray  # unsigned [M]
    bytes_per_token: float | None  # UTF-8 bytes of the held-out text per token; None: unknown
    fingerprint: str  # hash of the tokens; of files, of `sampled_hash` and the header
    source: str  # where the train part is from, for messages
    heldout_source: str  # where the held-out part is from
    heldout_cure: str = "raise --data.heldout-fraction"  # if the held-out part is too short


def outside_vocabulary(part: np.ndarray, vocab_size: int, where: str) -> str:
    """The message about the first token of a part that is not in the vocabulary."""
    place = _first_outside(part, vocab_size)
    if place is None:
        return f"{where} has another largest token than {HEADER} says: prepare the data again."
    return (
        f"{where} holds token {part[place]}, outside a vocabulary of {vocab_size}, at position "
        f"{place}: it is corrupt, was made with another tokenizer, or has another type "
        "(--data.headerless). For ids whose tokenizer is unknown use --data.tokenizer ids:N, "
        "where every id is below N."
    )


def _first_outside(tokens: np.ndarray, vocab_size: int) -> int | None:
    """The position of the first token that is not in the vocabulary."""
    for start in range(0, len(tokens), _PIECE):
        wrong = tokens[start : start + _PIECE] >= vocab_size
        if wrong.any():
            return start + int(np.argmax(wrong))
    return None


def sampled_hash(tokens: np.ndarray) -> str:
    """A hash of the length and of 64 evenly spaced pieces of 4096 tokens, both ends included.

    Hashing every token of a large file would take minutes.
    """
    digest = hashlib.sha256(str((len(tokens), tokens.dtype)).encode())
    for start in np.linspace(0, max(0, len(tokens) - 4096), 64).astype(int):
        digest.update(tokens[start : start + 4096].tobytes())
    return digest.hexdigest()


def joined_hash(*parts: str) -> str:
    """One hash of several."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
