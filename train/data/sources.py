"""Token files: what `prepare` writes and memory maps read back."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train import files
from train.data import bare, places, tokenizers
from train.data.config import DataConfig
from train.data.embedded import cut
from train.data.prepare import tfds
from train.data.prepare.documents import shards as files_of
from train.data.prepare.readers import Shard
from train.data.tasks import mixture
from train.data.tokenizers import Tokenizer

HEADER = "header.json"
FORMAT = "sophia_optax tokens 1"
KINDS = ("embedded", "bin", "text", "jsonl", "csv", "tsv", "parquet", "tfds")
_DTYPES = ("uint8", "uint16", "uint32")


class Tokens(NamedTuple):
    """A text as tokens, cut in two."""

    train: np.ndarray  # unsigned [N], often a memory map
    heldout: np.ndarray  # unsigned [M]
    bytes_per_token: float | None  # of the held-out text, as UTF-8; None where that is unknown
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
    return f"{kind}:{places.absolute(rest)}"


def parse(source: str) -> tuple[str, str]:
    """(kind, what follows the colon) of a source.

    Raises:
      ValueError: a kind that is none; the message suggests the nearest.

    >>> parse("tfds:glue/sst2")
    ('tfds', 'glue/sst2')
    """
    files.check_local(source, "source")
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
    from models.reading import fields_of, read_json  # late: models need more libraries

    path = folder / HEADER
    if not path.is_file():
        return None
    try:
        header = read_json(path)
        with fields_of(path):
            _check_header(header)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a header that this version writes ("
            f"{str(error).removeprefix(f'{path} ').rstrip('.')}). Prepare the data again."
        ) from error
    return header


def _check_header(header: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError for a header whose fields are of another form."""
    if header["format"] != FORMAT or header["dtype"] not in _DTYPES:
        raise ValueError(f"format {header['format']!r:.40}, dtype {header['dtype']!r:.40}")
    tokenizer, size = header["tokenizer"], header["tokenizer"]["vocab_size"]
    if not isinstance(size, int) or not all(type(tokenizer[k]) is str for k in ("name", "hash")):
        raise TypeError("tokenizer needs name and hash as texts and vocab_size as a number")
    if not isinstance(header["request"], str):
        raise TypeError("request is no text")
    for name in ("train", "heldout"):
        split = header["splits"][name]
        numbers = [split[key] for key in ("tokens", "bytes", "largest")]
        if not all(type(n) in (int, float) and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"counts of {name} that are no numbers, or are negative or too large")
        if type(split["tokens"]) is not int or type(split["sha256"]) is not str:
            raise TypeError(f"{name} counts its tokens by {split['tokens']!r:.40}")


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
            f"{path} was prepared with another tokenizer, {header['tokenizer']['name']} (by "
            f"{HEADER} its hash is {header['tokenizer']['hash']}, not {tokenizer.hash} of "
            f"{tokenizer.name}). Ask for it: --data.tokenizer {_own(path, header)}."
        )
    if header["tokenizer"]["vocab_size"] != tokenizer.vocab_size:
        raise ValueError(
            f"{path / HEADER} is of a version that counted {header['tokenizer']['vocab_size']} "
            f"tokens where the tokenizer has ids up to {tokenizer.vocab_size - 1}: prepare the "
            "data again."
        )
    splits = header["splits"]
    train, heldout = (
        _map(path / f"{name}.bin", header["dtype"], splits[name]) for name in ("train", "heldout")
    )
    for name, part in (("train", train), ("heldout", heldout)):
        if splits[name]["largest"] >= tokenizer.vocab_size:
            raise ValueError(outside(part, tokenizer.vocab_size, str(path / f"{name}.bin")))
    counted = splits["heldout"] if splits["heldout"]["tokens"] else splits["train"]
    # The files too, which may have been written again since their header was.
    written = splits["train"]["sha256"], splits["heldout"]["sha256"]
    identity = _digest(*written, _sampled(train), _sampled(heldout))
    ratio = counted["bytes"] / max(1, counted["tokens"])
    cure = "prepare it with a higher --data.heldout-fraction"  # which it keeps
    return Tokens(train, heldout, ratio, identity, str(path), str(path), cure)


def outside(part: np.ndarray, vocab_size: int, where: str) -> str:
    """The message on the first token of a part that the tokenizer lacks."""
    place = bare.first_outside(part, vocab_size)
    if place is None:
        return f"{where} has another largest token than {HEADER} says: prepare the data again."
    return (
        f"{where} holds token {part[place]}, outside a vocabulary of {vocab_size}, at place "
        f"{place}: it is corrupt, was "
        "made with another tokenizer, or has another type (--data.headerless). Ids whose tokenizer "
        "is not known are taken as they are with --data.tokenizer ids:N, each below N."
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


def tokenizer_of(source: str, config: DataConfig) -> str:
    """The tokenizer that comes with a bin: source, or an empty text.

    Raises:
      ValueError: its header cannot be read.
    """
    kind, rest = parse(source)
    if kind != "bin":
        return ""
    path = Path(places.absolute(rest))
    if header := read_header(path):
        own = _own(path, header)
        if own != "bytes" and tokenizers.inside(Path(own)) is None:
            raise ValueError(
                f"{path / HEADER} names the tokenizer {header['tokenizer']['name']!r:.80}, which "
                f"{own} does not hold: copy the folder as a whole, or say where the tokenizer is, "
                "--data.tokenizer."
            )
        return own
    if config.headerless or not bare.is_bare(path):
        return ""
    return f"ids:{bare.vocabulary(bare.parts(path, config))}"


def _own(path: Path, header: dict[str, Any]) -> str:
    name = header["tokenizer"]["name"]
    return name if name == "bytes" else str(path / "tokenizer")


def _map(path: Path, dtype: str, split: dict[str, Any]) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is missing: prepare the data again, or copy it as a whole.")
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if size != split["tokens"] * item:
        raise ValueError(
            f"{path} has {size} bytes where its header counts {split['tokens']} tokens of {item}: "
            "it is cut or was changed. Copy it again or prepare the data again."
        )
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


def _headerless(path: Path, tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    if not path.exists():
        raise ValueError(
            f"bin:{path} does not exist: give a folder that `prepare` made. Looked for "
            f"{path.absolute()}."
        )
    if not config.headerless and not bare.is_bare(path):
        raise ValueError(
            f"{path} has no {HEADER}: give a folder that `prepare` made, or one with train.bin and "
            "val.bin, or say which tokens a file without header holds, --data.headerless uint16."
        )
    parts = bare.parts(path, config)
    judge = parts[1] if len(parts[1]) else parts[0]
    some = np.asarray(judge[: 2**20])
    if some.size and some.max() >= tokenizer.vocab_size:
        name = "val.bin" if path.is_dir() and len(parts[1]) else ""
        raise ValueError(outside(judge, tokenizer.vocab_size, str(path / name)))
    ratio = None
    if tokenizer.is_text:
        ratio = len(tokenizer.decode(some).encode()) / max(1, len(some))
    names = ("train.bin", "val.bin") if path.is_dir() else ("", "")
    where, place = (str(path / name) for name in names)
    identity = _digest(*map(_sampled, parts))
    found = Tokens(parts[0], parts[1], ratio, identity, where, place)
    return found._replace(cure="give a longer val.bin") if path.is_dir() else found


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
