"""Loads the data of a run: from a config to batches."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from train.data import paths, source_string, sources, tokenizers
from train.data.config import DataConfig
from train.data.rows import Data, Rows
from train.data.source_string import parse_mixture
from train.data.tasks import causal, classify, masked, mixture
from train.data.tokenizers import Tokenizer
from train.data.tokens import Tokens


def load(config: DataConfig, *, batch_size: int, sequence_length: int, seed: int) -> Data:
    """Loads the data of a run.

    Row i of step s is row s B + i of an endless list of epochs, each in its own order: a function
    of (seed, s, i) alone, on any process and after any other call. A batch may span two epochs, so
    a source with fewer rows than a batch repeats some of them within the batch.

    Sources of documents are first turned into token files, which are kept in `config.cache`. For a
    large source `prepare` does the same with a progress bar and in a folder of your choice.

    Args:
      config: the source, the tokenizer and the task.
      batch_size: B, rows of a step over all processes.
      sequence_length: T.
      seed: of the order of rows, and of the masked tokens; not negative.

    Raises:
      ValueError: the source or the tokenizer is missing, broken, or does not fit the other, or the
        text is shorter than a window; the message names the file and the cure.

    >>> load(DataConfig(), batch_size=2, sequence_length=8, seed=0).batch(0).inputs.shape
    (2, 8)
    """
    if batch_size < 1 or sequence_length < 1 or seed < 0:
        raise ValueError(
            f"batch_size={batch_size} and sequence_length={sequence_length} must be at least 1, "
            f"and seed={seed} not negative."
        )
    config = resolved(config)
    if config.heldout_source:
        config = dataclasses.replace(config, heldout_fraction=0.0)
    tokenizer = tokenizers.load(config.tokenizer)
    parts = parse_mixture(config.source)
    if config.segments and not tokenizer.is_text:
        raise ValueError(
            "data.segments needs the token that ends a document, which ids without a tokenizer do "
            f"not tell: give the tokenizer of {config.source}, --data.tokenizer."
        )
    make = _classify if config.task == "classify" else _of_text
    return make(config, parts, tokenizer, batch_size, sequence_length, seed)


def resolved(config: DataConfig) -> DataConfig:
    """The config as a run records it: with absolute paths, and with the tokenizer of bin: sources.

    A tokenizer other than the default, bytes, is kept; data that does not fit it is refused later.

    Raises:
      ValueError: a source is malformed, or its header cannot be read.

    >>> resolved(DataConfig(source="text:/a/*.txt")).tokenizer
    'bytes'
    """
    tokenizer = config.tokenizer
    if tokenizer == "bytes":
        found = [sources.tokenizer_of(source, config) for source, _ in parse_mixture(config.source)]
        ids = [int(name[4:]) for name in found if name.startswith("ids:")]
        if ids and config.heldout_source:
            name = sources.tokenizer_of(config.heldout_source, config)
            ids += [int(name[4:])] * name.startswith("ids:")
        named = next((name for name in found if name and not name.startswith("ids:")), "")
        tokenizer = named or (f"ids:{max(ids)}" if ids else tokenizer)
    elif Path(tokenizer).expanduser().exists():
        tokenizer = paths.absolute(tokenizer)
    return dataclasses.replace(
        config,
        source=source_string.absolute(config.source),
        heldout_source=source_string.absolute(config.heldout_source),
        tokenizer=tokenizer,
    )


def _of_text(
    config: DataConfig,
    parts: list[tuple[str, float]],
    tokenizer: Tokenizer,
    batch_size: int,
    length: int,
    seed: int,
) -> Data:
    tokens = [sources.open_source(source, tokenizer, config) for source, _ in parts]
    evaluated = tokens
    if config.heldout_source:
        other = sources.open_source(config.heldout_source, tokenizer, config)
        if not len(other.heldout):
            other = other._replace(heldout=other.train, heldout_source=other.source)
        evaluated = [other]
        tokens = [_with_heldout(part, other) for part in tokens]
    rows = [_rows(part, tokenizer, config, length, seed) for part in tokens]
    weights = [weight for _, weight in parts]
    mixed = rows[0] if len(rows) == 1 else mixture.mixed_rows(rows, weights, seed)
    if config.heldout_source:
        mixed = mixed._replace(heldout=rows[0].heldout, heldout_count=rows[0].heldout_count)
    prints = [part.fingerprint for part in (*tokens, *evaluated)]
    return Data(
        mixed,
        batch_size,
        tokenizer,
        _bytes_per_token(evaluated),
        fingerprint(tokenizer, *prints, str(weights)),
    )


def _rows(tokens: Tokens, tokenizer: Tokenizer, config: DataConfig, length: int, seed: int) -> Rows:
    if config.task == "masked":
        how = {"rate": config.mask_rate, "segments": config.segments}
        return masked.masked_rows(tokens, tokenizer, sequence_length=length, seed=seed, **how)
    return causal.next_token_rows(
        tokens,
        sequence_length=length,
        seed=seed,
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.end if config.segments else None,
    )


def _with_heldout(tokens: Tokens, other: Tokens) -> Tokens:
    """The tokens with the held-out part of another source."""
    return tokens._replace(
        heldout=other.heldout,
        heldout_source=other.heldout_source,
        heldout_cure="give another --data.heldout-source",
    )


def _bytes_per_token(evaluated: list[Tokens]) -> float | None:
    """The mean over the held-out parts, weighted by their tokens; None if one is unknown."""
    sizes = np.array([len(part.heldout) for part in evaluated], np.float64)
    ratios = [part.bytes_per_token for part in evaluated if part.bytes_per_token is not None]
    if len(ratios) < len(evaluated):
        return None
    return float(sizes @ np.array(ratios) / max(1.0, sizes.sum()))


def _classify(
    config: DataConfig,
    parts: list[tuple[str, float]],
    tokenizer: Tokenizer,
    batch_size: int,
    length: int,
    seed: int,
) -> Data:
    if len(parts) > 1:
        raise ValueError(
            f"source {config.source!r}: task=classify reads one source, not a mixture."
        )
    train, heldout = classify.read(config.source, tokenizer, config)
    if config.heldout_source:
        heldout = classify.read(config.heldout_source, tokenizer, config)[0]
    names = classify.class_names(train.labels)
    rows = classify.classify_rows(
        train, heldout, names, tokenizer, sequence_length=length, seed=seed
    )
    tokens = sum(len(text) for texts in heldout.texts for text in texts)
    return Data(
        rows,
        batch_size,
        tokenizer,
        sum(heldout.sizes) / max(1, tokens),
        fingerprint(tokenizer, classify.fingerprint_of(train, heldout), *names),
        names,
    )


def fingerprint(tokenizer: Tokenizer, *parts: str) -> str:
    """A hash of the tokenizer and of everything else that decides the tokens of a batch."""
    return hashlib.sha256("\n".join((tokenizer.hash, *parts)).encode()).hexdigest()[:16]
