"""Rows of a classifier: one labelled text, or one pair of texts, in each row."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from train.data import storage
from train.data.config import DataConfig
from train.data.prepare.documents import documents
from train.data.prepare.source_files import source_files
from train.data.prepare.token_writer import held_out
from train.data.rows import Rows
from train.data.tasks.windows import epoch_order
from train.data.tokenizers import Tokenizer
from train.step.batch import Batch


class Examples(NamedTuple):
    """Labelled texts, held in memory as tokens."""

    texts: list[list[np.ndarray]]  # one or two texts for each example
    labels: list[str]
    sizes: list[int]  # UTF-8 bytes of each example's text


def read(source: str, tokenizer: Tokenizer, config: DataConfig) -> tuple[Examples, Examples]:
    """The training and the held-out examples of a source, split by their hash.

    Raises:
      ValueError: one of the two has no examples, or there are more than two text fields.
    """
    files, fields = source_files(source, config)
    if len(fields) > 2:
        raise ValueError(
            f"text_field={','.join(fields)} names {len(fields)} fields; name one or two."
        )
    split = Examples([], [], []), Examples([], [], [])
    skipped: list[str] = []
    for file in files:
        for *texts, label in documents(file, config, (*fields, config.label_field), skipped):
            raw = "\n".join(texts).encode()
            side = split[held_out(raw, config.heldout_fraction)]
            tokens = [tokenizer.encode(text) for text in texts]
            side.texts.append([storage.narrow(t, tokenizer.dtype, str(file.path)) for t in tokens])
            side.labels.append(_label(label, source))
            side.sizes.append(len(raw))
    if not split[0].labels or (config.heldout_fraction and not split[1].labels):
        first = f" (skipped {len(skipped)}, first {skipped[0]})" if skipped else ""
        raise ValueError(
            f"{source} has {len(split[0].labels)} training and {len(split[1].labels)} held-out "
            f"examples{first}; give more, or another --data.heldout-fraction."
        )
    return split


def _label(value: Any, source: str) -> str:
    if isinstance(value, bool | int | np.integer | str) and value != "":
        return str(value)
    raise ValueError(
        f"{source}: label {value!r} is not a class; classes are strings or whole numbers "
        "(--data.label-field)."
    )


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The sorted classes: by number if all are numbers, otherwise as strings.

    Labels that spell the same number differently, such as "1" and "01", are different classes.

    >>> class_names(["10", "9", "9", "09"])
    ('09', '9', '10')
    """
    try:
        return tuple(sorted(set(labels), key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(set(labels)))


def classify_rows(
    train: Examples,
    heldout: Examples,
    names: tuple[str, ...],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    seed: int,
) -> Rows:
    """[CLS] a [SEP], or [CLS] a [SEP] b [SEP], then padding.

    `types` is 1 in b and its [SEP]; `segments` is 1 in padding, so that no token attends to it.
    A row that is too long loses the end of its longer text. Epochs are shuffled as windows are.

    Raises:
      ValueError: a held-out class has no training example, or there is no room for text.
    """
    if sequence_length < 5:
        raise ValueError(
            f"sequence_length={sequence_length} has no room for [CLS] a [SEP] b [SEP]."
        )
    if unknown := sorted(set(heldout.labels) - set(names)):
        raise ValueError(
            f"held-out examples have the class {unknown[0]!r}, which no training example has; "
            f"those have {', '.join(names)}."
        )
    numbers = {name: i for i, name in enumerate(names)}
    made = _ClassRows(tokenizer, numbers, sequence_length)
    size, order = len(train.labels), functools.lru_cache(maxsize=2)(epoch_order)

    def shuffled(number_N: np.ndarray) -> Batch:
        epoch_N, place_N = np.divmod(number_N, size)
        pairs = zip(epoch_N, place_N, strict=True)
        index_N = np.array([order(seed, e, size, 1)[1][p] for e, p in pairs], np.int64)
        return made.batch(train, index_N)

    return Rows(shuffled, functools.partial(made.batch, heldout), len(heldout.labels))


@dataclasses.dataclass(frozen=True)
class _ClassRows:
    """How examples become rows."""

    tokenizer: Tokenizer
    numbers: dict[str, int]  # name of a class -> its number
    length: int  # T

    def batch(self, examples: Examples, index_N: np.ndarray) -> Batch:
        made = [_row(examples.texts[i], self.tokenizer, self.length) for i in index_N]
        inputs, types, segments = (
            np.array(made, np.int32).reshape(-1, 3, self.length).swapaxes(0, 1)
        )
        targets = np.array([self.numbers[examples.labels[i]] for i in index_N], np.int32)
        weights = np.ones(len(targets), np.float32)
        return Batch(inputs, targets, weights, segments, types)


def _row(texts: list[np.ndarray], tokenizer: Tokenizer, length: int) -> np.ndarray:
    """Tokens, types and segments, int32[3, T]."""
    begin = tokenizer.end if tokenizer.begin is None else tokenizer.begin
    row = np.zeros((3, length), np.int32)
    row[0], row[2] = tokenizer.pad, 1
    row[:, 0], at = (begin, 0, 0), 1
    for second, text in enumerate(_shortened(texts, length - 1 - len(texts))):
        stop = at + len(text) + 1
        row[0, at : stop - 1], row[0, stop - 1] = text, tokenizer.end
        row[1, at:stop], row[2, at:stop] = second, 0
        at = stop
    return row


def _shortened(texts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """One or two texts, cut to `room` tokens in all."""
    if len(texts) == 1:
        return [texts[0][:room]]
    a, b = len(texts[0]), len(texts[1])
    keep_b = min(b, max(room // 2, room - a))
    return [texts[0][: room - keep_b], texts[1][:keep_b]]


def fingerprint_of(*parts: Examples) -> str:
    """A hash of all examples, in order."""
    digest = hashlib.sha256()
    for part in parts:
        for texts, label in zip(part.texts, part.labels, strict=True):
            digest.update(f"{[len(t) for t in texts]} {label}\n".encode())
            for text in texts:
                digest.update(text.tobytes())
    return digest.hexdigest()[:16]
