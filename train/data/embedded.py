"""The text that is shipped with the trainer, and its tokens: bytes."""

import functools
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data import storage

HELDOUT_FRACTION = 0.05
_TEXT = Path(__file__).parent / "texts" / "shakespeare.txt.xz"


class Corpus(NamedTuple):
    """The tokens of a text, split in two."""

    train: np.ndarray  # uint8 [N]
    heldout: np.ndarray  # uint8 [M], the end of the text


@functools.cache
def shakespeare() -> Corpus:
    """Ten plays of Shakespeare, 1.27 MB, shipped with the trainer (`texts/PROVENANCE.md`).

    Returns:
        The corpus: the last `HELDOUT_FRACTION` of the text, from *The Tempest*, is held out.
        The arrays are read-only, since all callers share them.

    >>> decode(shakespeare().train[:16])
    'ROMEO AND JULIET'
    """
    text = np.frombuffer(lzma.decompress(_TEXT.read_bytes()), np.uint8)
    return split_tail(text, HELDOUT_FRACTION)


def split_tail(tokens: np.ndarray, fraction: float) -> Corpus:
    """Holds out the last `fraction` of a text.

    >>> split_tail(np.arange(10), 0.2).heldout
    array([8, 9])
    """
    first = len(tokens) - round(fraction * len(tokens))
    return Corpus(tokens[:first], tokens[first:])


def encode(text: str) -> np.ndarray:
    """The UTF-8 bytes of a text as tokens, int32 [T].

    >>> encode("hé")
    array([104, 195, 169], dtype=int32)
    """
    return storage.narrow(np.frombuffer(text.encode(), np.uint8), np.int32, "bytes")


def decode(tokens: np.ndarray) -> str:
    """The text of byte tokens [T]; bytes that are not UTF-8 become the replacement character.

    Raises:
        ValueError: a token is above 255 or negative.

    >>> decode(encode("Exeunt."))
    'Exeunt.'
    """
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= 255:
        raise ValueError(
            f"tokens reach from {tokens.min()} to {tokens.max()}, bytes from 0 to 255: sample from "
            "the first 256 logits, or decode with the tokenizer that the model was trained on"
        )
    return storage.narrow(tokens, np.uint8, "tokens").tobytes().decode(errors="replace")
