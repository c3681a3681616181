"""Text to token numbers and back: bytes, GPT-2's BPE, any tokenizer.json, WordPiece."""

import dataclasses
import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data import embedded
from train.extras import need

_GPT2 = ("encoder.json", "vocab.bpe")
_ALONE = {".json": "tokenizer.json", ".txt": "vocab.txt"}  # of one file: what a folder calls it
_END = ("<|endoftext|>", "[SEP]", "</s>", "<eos>", "<|end_of_text|>")
_BEGIN = ("[CLS]", "<s>", "<bos>")
_PAD = ("[PAD]", "<pad>")
_MASK = ("[MASK]", "<mask>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary, and the tokens in it that are no text."""

    name: str
    """As it was asked for: bytes, or a path."""
    hash: str
    """Of all that changes the tokens of a text."""
    vocab_size: int
    encode: Callable[[str], np.ndarray]
    """Text to int[T], without tokens that are no text."""
    decode: Callable[[np.ndarray], str]
    end: int
    """Ends a document, and parts sentences: <|endoftext|>, [SEP]."""
    pad: int
    begin: int | None = None
    """[CLS]."""
    mask: int | None = None
    """[MASK]."""
    files: tuple[Path, ...] = ()
    """What it was read from."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds every token."""
        return np.min_scalar_type(self.vocab_size - 1)

    def copy(self, folder: Path) -> None:
        """Writes what it was read from into a folder, which then names this tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.files:
            name = path.name if len(self.files) > 1 else _ALONE[path.suffix]
            shutil.copyfile(path, folder / name)


def load(name: str) -> Tokenizer:
    """The tokenizer of a name or path.

    Raises:
      ValueError: there is none, or its files are not what their names say.

    >>> load("bytes").encode("né").tolist()
    [110, 195, 169]
    """
    path = Path(name).expanduser()
    if name == "bytes":
        return _bytes()
    if path.is_dir() and (inner := _inside(path)):
        return load(str(inner)) if inner != path else _gpt2(path, name)
    if path.is_file() and path.suffix == ".json":
        return _json(path, name)
    if path.is_file() and path.suffix == ".txt":
        return _wordpiece(path, name)
    what = "holds none of those" if path.is_dir() else "is neither"
    raise ValueError(
        f"unknown tokenizer {name!r}: give bytes, a folder with {' and '.join(_GPT2)}, the path of "
        f"a tokenizer.json or of a WordPiece vocab.txt; {path} {what}."
    )


def _inside(folder: Path) -> Path | None:
    if all((folder / file).is_file() for file in _GPT2):
        return folder
    files = (folder / file for file in _ALONE.values())
    return next((file for file in files if file.is_file()), None)


def _bytes() -> Tokenizer:
    # Control characters that stand for what they were made for: NUL, start and end of text,
    # substitute.
    return Tokenizer(
        "bytes", "bytes", 256, embedded.encode, embedded.decode, end=3, pad=0, begin=2, mask=26
    )


def _gpt2(folder: Path, name: str) -> Tokenizer:
    tiktoken = need("tiktoken", "data", "GPT-2's tokenizer")
    files = tuple(folder / file for file in _GPT2)
    numbers, merges = (
        json.loads(files[0].read_text(encoding="utf-8")),
        files[1].read_text(encoding="utf-8").split("\n"),
    )
    characters = {character: byte for byte, character in _byte_characters().items()}
    end = numbers.pop("<|endoftext|>", len(numbers))
    pairs = [
        line.replace(" ", "", 1) for line in merges if line and not line.startswith("#version")
    ]
    if [numbers.get(pair) for pair in pairs] != list(range(256, 256 + len(pairs))):
        raise ValueError(
            f"{files[1]} and {files[0]} do not belong together: merge i must be token 256 + i. "
            "Take both from one copy of GPT-2's tokenizer."
        )
    ranks = {bytes(characters[c] for c in token): number for token, number in numbers.items()}
    special = {"<|endoftext|>": end}
    openai = importlib.import_module("tiktoken_ext.openai_public")
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=openai.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )
    return Tokenizer(
        name,
        _hash(files),
        end + 1,
        # Text that spells <|endoftext|> is text.
        lambda text: encoding.encode_to_numpy(text, disallowed_special=()),
        _checked(lambda tokens: encoding.decode(tokens.tolist()), end + 1),
        end=end,
        pad=end,
        files=files,
    )


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's files."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def _json(path: Path, name: str) -> Tokenizer:
    library = need("tokenizers", "data", f"the tokenizer {path}")
    try:
        model = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer.json: {error}.") from error
    model.no_truncation()
    model.no_padding()
    return _of_library(model, path, name)


def _wordpiece(path: Path, name: str) -> Tokenizer:
    library = need("tokenizers", "data", f"the tokenizer {path}")
    words = path.read_text(encoding="utf-8").splitlines()
    cased = any(word != word.lower() for word in words if not word.startswith("["))
    missing = {"[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"} - set(words)
    if missing:
        raise ValueError(
            f"{path} is no WordPiece vocabulary: {', '.join(sorted(missing))} is missing, and it "
            "has one token a line."
        )
    model = library.BertWordPieceTokenizer({w: i for i, w in enumerate(words)}, lowercase=not cased)
    return _of_library(model._tokenizer, path, name)


def _of_library(model: Any, path: Path, name: str) -> Tokenizer:
    def first(names: Sequence[str]) -> int | None:
        return next((n for n in map(model.token_to_id, names) if n is not None), None)

    end, size = first(_END), model.get_vocab_size()
    if end is None:
        raise ValueError(
            f"{path} has no token that ends a document, none of {', '.join(_END)}: add one of them "
            "to it as a special token."
        )
    pad = first(_PAD)

    def encode(text: str) -> np.ndarray:
        return np.asarray(model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(tokens: np.ndarray) -> str:
        return model.decode(tokens.tolist(), skip_special_tokens=False)

    return Tokenizer(
        name,
        _hash((path,)),
        size,
        encode,
        _checked(decode, size),
        end=end,
        pad=end if pad is None else pad,
        begin=first(_BEGIN),
        mask=first(_MASK),
        files=(path,),
    )


def _checked(decode: Callable[[np.ndarray], str], size: int) -> Callable[[np.ndarray], str]:
    def checked(tokens: np.ndarray) -> str:
        tokens = np.asarray(tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            raise ValueError(
                f"tokens reach from {tokens.min()} to {tokens.max()}, the vocabulary from 0 to "
                f"{size - 1}: sample from its logits alone, or decode with the tokenizer that the "
                "model was trained on."
            )
        return decode(tokens)

    return checked


def _hash(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
