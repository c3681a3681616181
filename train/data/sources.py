"""Token files: what `prepare` writes and memory maps read back."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train import files
from train.data import mixture, tfds
from train.data.config import DataConfig
from train.data.documents import shards as files_of
from train.data.embedded import cut
from train.data.readers import Shard
from train.data.tokenizers import Tokenizer

HEADER = "header.json"
FORMAT = "sophia_optax tokens 1"
KINDS = ("embedded", "bin", "text", "jsonl", "csv", "tsv", "parquet", "tfds")
_DTYPES = ("uint8", "uint16", "uint32")


class Tokens(NamedTuple):
    """A text as tokens, cut in two."""

    train: np.ndarray  # unsigned [N], often a memory map
    heldout: np.ndarray  # unsigned [M]
    bytes_per_token: float  # of the held-out text, as UTF-8
    identity: str  # hash of the tokens; of files of what `_sampled` reads and their header states
    where: str  # for messages
    judge: str  # where the held-out part is from
    cure: str = "raise --data.heldout-fraction"  # of a held-out part that is too short


def absolute(source: str) -> str:
    """A source whose paths mean the same from any folder; mixtures keep their weights.

    >>> absolute("embedded:0.5,text:/a/*.txt:0.5"), absolute("tfds:glue/sst2:train")
    ('embedded:0.5,text:/a/*.txt:0.5', 'tfds:glue/sst2:train')
    """
    if not source:
        return source
    whole = len(mixture.parse(source)) == 1
    return ",".join(map(_absolute, [source] if whole else source.split(",")))


def _absolute(part: str) -> str:
    kind, rest = parse(part) if part.startswith("tfds:") else part.partition(":")[::2]
    if kind in ("embedded", "tfds") or kind not in KINDS or not rest:
        return part
    return f"{kind}:{Path(rest).expanduser().absolute()}"


def parse(source: str) -> tuple[str, str]:
    """(kind, what follows the colon) of a source.

    Raises:
      ValueError: a kind that is none; the message suggests the nearest.

    >>> parse("tfds:glue/sst2")
    ('tfds', 'glue/sst2')
    """
    kind, _, rest = source.partition(":")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"unknown source {source!r}.{hint} Give {KINDS[0]}, or one of {', '.join(KINDS[1:])} "
            "with a colon and a path or name, such as text:books/*.txt."
        )
    if (kind == "embedded") == bool(rest):
        raise ValueError(
            f"source {source!r} should have {'no' if rest else 'a'} path: "
            f"{'embedded' if rest else f'{kind}:PATH'}."
        )
    return kind, rest


def shards(source: str, config: DataConfig) -> tuple[list[Shard], tuple[str, ...]]:
    """The files of a source of documents, and the fields that are text.

    Raises:
      ValueError: it has none, or holds no documents.
    """
    kind, rest = parse(source)
    if kind in ("embedded", "bin"):
        raise ValueError(f"source {source!r} holds tokens, not documents: use text:, jsonl: ...")
    found = tfds.shards(rest, config) if kind == "tfds" else files_of(kind, rest)
    fields = config.text_field or (tfds.text_field(rest) if kind == "tfds" else "text")
    return found, tuple(fields.split(","))


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Marks a folder of token files as complete, in one step."""
    files.replace_text(folder / HEADER, json.dumps(header, indent=1) + "\n")


def read_header(folder: Path) -> dict[str, Any] | None:
    """The header of a folder of token files, or None.

    Raises:
      ValueError: it cannot be read.
    """
    path = folder / HEADER
    if not path.is_file():
        return None
    try:
        header = json.loads(path.read_text())
        if header["format"] != FORMAT or header["dtype"] not in _DTYPES:
            raise ValueError(f"format {header['format']!r}, dtype {header['dtype']!r}")
        for split in header["splits"].values():
            if missing := {"tokens", "bytes", "sha256", "largest"} - set(split):
                raise KeyError(*sorted(missing))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a header that this version writes ({type(error).__name__}: {error}). "
            "Prepare the data again."
        ) from error
    return header


def open_tokens(path: Path, tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    """Memory maps of a folder that `prepare` made, or of files without a header.

    Raises:
      ValueError: they are not there, not whole, or of another tokenizer.
    """
    header = read_header(path)
    if header is None:
        return _headerless(path, tokenizer, config)
    if header["tokenizer"]["hash"] != tokenizer.hash:
        raise ValueError(
            f"{path} was prepared with another tokenizer, {header['tokenizer']['name']} (hash "
            f"{header['tokenizer']['hash']}, not {tokenizer.hash} of {tokenizer.name}). Ask for "
            f"it: --data.tokenizer {_own(path, header)}."
        )
    train, heldout = (
        _map(path / f"{name}.bin", header["dtype"], header["splits"][name])
        for name in ("train", "heldout")
    )
    largest = max(split["largest"] for split in header["splits"].values())
    if largest >= tokenizer.vocab_size:
        raise ValueError(outside(largest, tokenizer.vocab_size, str(path)))
    splits = header["splits"]
    counted = splits["heldout"] if splits["heldout"]["tokens"] else splits["train"]
    # The files too, which may have been written again since their header was.
    written = splits["train"]["sha256"], splits["heldout"]["sha256"]
    identity = _digest(*written, _sampled(train), _sampled(heldout))
    return Tokens(
        train, heldout, counted["bytes"] / counted["tokens"], identity, str(path), str(path)
    )


def outside(token: int, vocab_size: int, where: str) -> str:
    """The message on a token that the tokenizer lacks."""
    return (
        f"{where} holds token {token}, outside a vocabulary of {vocab_size}: it is corrupt, was "
        "made with another tokenizer, or has another type (--data.headerless)."
    )


def embedded_tokens(tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    """The shipped text; cut where it always is unless the config says otherwise."""
    from train import data  # late: tests put a shorter text in its place

    corpus = data.shakespeare()
    if config.heldout_fraction != DataConfig.heldout_fraction:
        corpus = cut(np.concatenate(corpus), config.heldout_fraction)
    parts = [np.asarray(part) for part in corpus]
    if tokenizer.name != "bytes":
        parts = [tokenizer.encode(part.tobytes().decode()) for part in parts]
    judge = 1 if len(parts[1]) else 0
    ratio = len(corpus[judge]) / max(1, len(parts[judge]))
    identity = _digest(*(part.tobytes().hex() for part in parts))
    return Tokens(parts[0], parts[1], ratio, identity, "the embedded text", "the embedded text")


def _own(path: Path, header: dict[str, Any]) -> str:
    name = header["tokenizer"]["name"]
    return name if name == "bytes" else str(path / "tokenizer")


def _map(path: Path, dtype: str, split: dict[str, Any] | None = None) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is missing: prepare the data again, or copy it as a whole.")
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if split is None and (size == 0 or size % item):
        raise ValueError(f"{path}: {size} bytes are no {dtype} tokens; the file is cut or empty.")
    if split is not None and size != split["tokens"] * item:
        raise ValueError(
            f"{path} has {size} bytes where its header counts {split['tokens']} tokens of {item}: "
            "it is cut or was changed. Copy it again or prepare the data again."
        )
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


def _headerless(path: Path, tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    if not path.exists():
        raise ValueError(f"bin:{path} does not exist: give a folder that `prepare` made.")
    if not config.headerless:
        raise ValueError(
            f"{path} has no {HEADER}: give a folder that `prepare` made, or say which tokens a "
            "file without header holds, --data.headerless uint16."
        )
    if path.is_dir():
        parts = [_map(path / name, config.headerless) for name in ("train.bin", "val.bin")]
    else:
        parts = list(cut(_map(path, config.headerless), config.heldout_fraction))
    some = np.asarray((parts[1] if len(parts[1]) else parts[0])[: 2**20])
    if some.size and some.max() >= tokenizer.vocab_size:
        raise ValueError(outside(int(some.max()), tokenizer.vocab_size, str(path)))
    ratio = len(tokenizer.decode(some.astype(np.int32)).encode()) / max(1, len(some))
    return Tokens(parts[0], parts[1], ratio, _digest(*map(_sampled, parts)), str(path), str(path))


def _sampled(tokens: np.ndarray) -> str:
    """A hash of the length and of 64 pieces of 4096 tokens, evenly spaced, the first and the last
    among them, since reading all of a large file takes minutes.
    """
    digest = hashlib.sha256(str((len(tokens), tokens.dtype)).encode())
    for start in np.linspace(0, max(0, len(tokens) - 4096), 64).astype(int):
        digest.update(tokens[start : start + 4096].tobytes())
    return digest.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
