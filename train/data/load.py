"""From a config to batches."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from train.data import places, sources, tokenizers
from train.data.config import DataConfig
from train.data.rows import Data, Rows
from train.data.sources import Tokens
from train.data.tasks import causal, classify, masked, mixture
from train.data.tokenizers import Tokenizer


def load(config: DataConfig, *, batch_size: int, sequence_length: int, seed: int) -> Data:
    """The data of a run.

    Row i of step s is row s B + i of an endless list, epoch after epoch, each in an order of its
    own: a function of (seed, s, i) alone, whoever asks and whatever was asked before. A batch may
    span epochs, so a source of fewer rows than a batch shows some of them twice in it.

    Sources of documents other than bin: are first turned into token files, which `config.cache`
    keeps; for large ones `prepare` does the same in view and where you choose.

    Args:
      config: what to read and what to make of it.
      batch_size: B, rows of a step over all processes.
      sequence_length: T.
      seed: of the order, and of what is hidden; not negative.

    Raises:
      ValueError: the config asks for what is not there, or the data is broken, another tokenizer's
        or shorter than a window; the message names the file and the cure.

    >>> load(DataConfig(), batch_size=2, sequence_length=8, seed=0).batch(0).inputs.shape
    (2, 8)
    """
    if batch_size < 1 or sequence_length < 1 or seed < 0:
        raise ValueError(
            f"batch_size={batch_size} and sequence_length={sequence_length} must be at least 1, "
            f"and seed={seed} not negative."
        )
    config = settled(config)
    if config.heldout_source:
        config = dataclasses.replace(config, heldout_fraction=0.0)
    tokenizer = tokenizers.load(config.tokenizer)
    parts = mixture.parse(config.source)
    if config.segments and not tokenizer.is_text:
        raise ValueError(
            f"data.segments needs the token that ends a document, which ids alone do not state: "
            f"name the tokenizer of {config.source}, --data.tokenizer."
        )
    make = _classify if config.task == "classify" else _of_text
    return make(config, parts, tokenizer, batch_size, sequence_length, seed)


def settled(config: DataConfig) -> DataConfig:
    """The config as it is recorded: its paths mean the same from any folder, and of a bin: source
    that brings its own tokenizer that is named.

    A tokenizer other than bytes, the default, stays: what does not go with it is refused later.

    Raises:
      ValueError: a source is none, or its header cannot be read.

    >>> settled(DataConfig(source="text:/a/*.txt")).tokenizer
    'bytes'
    """
    tokenizer = config.tokenizer
    if tokenizer == "bytes":
        found = [sources.tokenizer_of(source, config) for source, _ in mixture.parse(config.source)]
        ids = [int(name[4:]) for name in found if name.startswith("ids:")]
        if ids and config.heldout_source:
            judge = sources.tokenizer_of(config.heldout_source, config)
            ids += [int(judge[4:])] * judge.startswith("ids:")
        named = next((name for name in found if name and not name.startswith("ids:")), "")
        tokenizer = named or (f"ids:{max(ids)}" if ids else tokenizer)
    elif Path(tokenizer).expanduser().exists():
        tokenizer = places.absolute(tokenizer)
    return dataclasses.replace(
        config,
        source=sources.absolute(config.source),
        heldout_source=sources.absolute(config.heldout_source),
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
    tokens = [_open(source, tokenizer, config) for source, _ in parts]
    judges = tokens
    if config.heldout_source:
        judges = [judge := _judge(_open(config.heldout_source, tokenizer, config))]
        other = {"judge": judge.where, "cure": "give another --data.heldout-source"}
        tokens = [part._replace(heldout=judge.heldout, **other) for part in tokens]
    rows = [_rows(part, tokenizer, config, length, seed) for part in tokens]
    weights = [weight for _, weight in parts]
    mixed = rows[0] if len(rows) == 1 else mixture.mixed_rows(rows, weights, seed)
    if config.heldout_source:
        mixed = mixed._replace(heldout=rows[0].heldout, heldout_count=rows[0].heldout_count)
    prints = [part.identity for part in (*tokens, *judges)]
    return Data(
        mixed,
        batch_size,
        tokenizer,
        _bytes_per_token(judges),
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


def _open(source: str, tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    kind, rest = sources.parse(source)
    if kind == "embedded":
        return sources.embedded_tokens(tokenizer, config)
    if kind == "bin":
        return sources.open_tokens(Path(places.absolute(rest)), tokenizer, config)
    found = sources.open_tokens(_prepared(source, tokenizer, config), tokenizer, config)
    return found._replace(where=source, judge=source, cure=Tokens._field_defaults["cure"])


def _prepared(source: str, tokenizer: Tokenizer, config: DataConfig) -> Path:
    from train.data.prepare import prepare  # late: it needs what only the command line does

    request = prepare.request_hash(*sources.shards(source, config), tokenizer, config)
    folder = Path(config.cache).expanduser() / request[:16]
    prepare.prepare(source, folder, config, quiet=sources.read_header(folder) is not None)
    return folder


def _judge(tokens: Tokens) -> Tokens:
    return tokens if len(tokens.heldout) else tokens._replace(heldout=tokens.train)


def _bytes_per_token(judges: list[Tokens]) -> float | None:
    sizes = np.array([len(part.heldout) for part in judges], np.float64)
    ratios = [part.bytes_per_token for part in judges if part.bytes_per_token is not None]
    if len(ratios) < len(judges):
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
        raise ValueError(f"source {config.source!r}: task=classify reads one source, no mixture.")
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
        fingerprint(tokenizer, classify.identity(train, heldout), *names),
        names,
    )


def fingerprint(tokenizer: Tokenizer, *parts: str) -> str:
    """A hash of a tokenizer and of what else decides the tokens of a batch."""
    return hashlib.sha256("\n".join((tokenizer.hash, *parts)).encode()).hexdigest()[:16]
