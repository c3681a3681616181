"""Opens one source as tokens: the embedded text, token files, or documents that are prepared."""

from pathlib import Path
from typing import Any

import numpy as np

from train.data import embedded, headerless, paths, tokenizers
from train.data.config import DataConfig
from train.data.prepare.header import HEADER, SPLITS, read_header
from train.data.prepare.source_files import source_files
from train.data.source_string import parse_source
from train.data.tokenizers import Tokenizer
from train.data.tokens import Tokens, joined_hash, outside_vocabulary, sampled_hash


def open_source(source: str, tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    """The tokens of one source.

    Raises:
      ValueError: the source is missing, broken, or made by another tokenizer.
    """
    kind, rest = parse_source(source)
    if kind == "embedded":
        return _embedded(tokenizer, config)
    if kind == "bin":
        return open_token_files(Path(paths.absolute(rest)), tokenizer, config)
    found = open_token_files(_prepared(source, tokenizer, config), tokenizer, config)
    cure = Tokens._field_defaults["heldout_cure"]
    return found._replace(source=source, heldout_source=source, heldout_cure=cure)


def _embedded(tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    """The embedded text, split at its usual place unless the config says otherwise."""
    corpus = embedded.shakespeare()
    if config.heldout_fraction != DataConfig.heldout_fraction:
        corpus = embedded.split_tail(np.concatenate(corpus), config.heldout_fraction)
    parts = [np.asarray(part) for part in corpus]
    if tokenizer.name != "bytes":
        parts = [tokenizer.encode(part.tobytes().decode()) for part in parts]
    evaluated = 1 if len(parts[1]) else 0
    ratio = len(corpus[evaluated]) / max(1, len(parts[evaluated]))
    fingerprint = joined_hash(*(part.tobytes().hex() for part in parts))
    name = "the embedded text"
    return Tokens(parts[0], parts[1], ratio, fingerprint, name, name)


def _prepared(source: str, tokenizer: Tokenizer, config: DataConfig) -> Path:
    """The folder in the cache with the token files of a source of documents."""
    # Imported here: it needs tyro and rich, which the embedded text and token files do not.
    from train.data.prepare import prepare

    request = prepare.request_hash(*source_files(source, config), tokenizer, config)
    folder = Path(config.cache).expanduser() / request[:16]
    prepare.prepare(source, folder, config, quiet=read_header(folder) is not None)
    return folder


def open_token_files(path: Path, tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    """Memory maps of a folder that `prepare` made, or of files without a header.

    Raises:
      ValueError: the files are missing, cut, or made by another tokenizer.
    """
    header = read_header(path)
    if header is None:
        return headerless.open_headerless(path, tokenizer, config)
    _check_tokenizer(path, header, tokenizer)
    splits = header["splits"]
    train, heldout = (
        _memory_map(path / f"{name}.bin", header["dtype"], splits[name]) for name in SPLITS
    )
    for name, part in (("train", train), ("heldout", heldout)):
        if splits[name]["largest"] >= tokenizer.vocab_size:
            where = str(path / f"{name}.bin")
            raise ValueError(outside_vocabulary(part, tokenizer.vocab_size, where))
    counted = splits["heldout"] if splits["heldout"]["tokens"] else splits["train"]
    # The files are hashed too, since they may have been replaced after the header was written.
    written = splits["train"]["sha256"], splits["heldout"]["sha256"]
    fingerprint = joined_hash(*written, sampled_hash(train), sampled_hash(heldout))
    ratio = counted["bytes"] / max(1, counted["tokens"])
    cure = "prepare it with a higher --data.heldout-fraction"  # the folder keeps its own share
    return Tokens(train, heldout, ratio, fingerprint, str(path), str(path), cure)


def _check_tokenizer(path: Path, header: dict[str, Any], tokenizer: Tokenizer) -> None:
    if header["tokenizer"]["hash"] != tokenizer.hash:
        raise ValueError(
            f"{path} was prepared with another tokenizer, {header['tokenizer']['name']} (by "
            f"{HEADER} its hash is {header['tokenizer']['hash']}; {tokenizer.name} has "
            f"{tokenizer.hash}). Use that one: --data.tokenizer {_own_tokenizer(path, header)}."
        )
    if header["tokenizer"]["vocab_size"] != tokenizer.vocab_size:
        raise ValueError(
            f"{path / HEADER} is of a version that counted {header['tokenizer']['vocab_size']} "
            f"tokens where the tokenizer has ids up to {tokenizer.vocab_size - 1}: prepare the "
            "data again."
        )


def tokenizer_of(source: str, config: DataConfig) -> str:
    """The name of the tokenizer that a bin: source brings along; "" if it brings none.

    Raises:
      ValueError: the header cannot be read, or the tokenizer it names is missing.
    """
    kind, rest = parse_source(source)
    if kind != "bin":
        return ""
    path = Path(paths.absolute(rest))
    if header := read_header(path):
        own = _own_tokenizer(path, header)
        if own != "bytes" and tokenizers.inside(Path(own)) is None:
            raise ValueError(
                f"{path / HEADER} names the tokenizer {header['tokenizer']['name']!r:.80}, which "
                f"{own} does not hold: copy the folder as a whole, or give the tokenizer's path, "
                "--data.tokenizer."
            )
        return own
    if config.headerless or not headerless.is_headerless(path):
        return ""
    return f"ids:{headerless.vocab_size_of(headerless.memory_maps(path, config))}"


def _own_tokenizer(path: Path, header: dict[str, Any]) -> str:
    name = header["tokenizer"]["name"]
    return name if name == "bytes" else str(path / "tokenizer")


def _memory_map(path: Path, dtype: str, split: dict[str, Any]) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is missing: prepare the data again, or copy it as a whole.")
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if size != split["tokens"] * item:
        raise ValueError(
            f"{path} has {size} bytes, but its header counts {split['tokens']} tokens of {item} "
            "bytes: it is cut or was changed. Copy it again or prepare the data again."
        )
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)
