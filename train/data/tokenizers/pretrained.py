"""Tokenizers by the library `tokenizers`: any tokenizer.json, and BERT's vocab.txt."""

import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from models.reading import LARGEST, fields_of, read_json
from train.data import storage
from train.data.tokenizers.vocabulary import Tokenizer, hash_of, named, size_of, total
from train.extras import need

_END = ("<|endoftext|>", "[SEP]", "</s>", "<eos>", "<|end_of_text|>")
_BEGIN = ("[CLS]", "<s>", "<bos>")
_PAD = ("[PAD]", "<pad>")
_MASK = ("[MASK]", "<mask>")
_RULES = 2  # under version 1, text that spelled a special token became that token


def load(path: Path, name: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
      ValueError: the file is damaged, or has no token that ends a document.
    """
    library = need("tokenizers", "data", f"the tokenizer {path}")
    stated = read_json(path)  # bounds the size, and has better messages than the library
    with named(path, "tokenizer.json"):
        model = library.Tokenizer.from_file(str(path))
    model.no_truncation()
    model.no_padding()
    with fields_of(path):
        _check_added(model, stated.get("added_tokens") or [], path)
    return _of_library(model, path, name)


def load_wordpiece(path: Path, name: str) -> Tokenizer:
    """The tokenizer of BERT's vocab.txt, which has one token per line.

    It lowers the case of texts unless a word of the vocabulary has capitals.

    Raises:
      ValueError: the file is not a WordPiece vocabulary.
    """
    library = need("tokenizers", "data", f"the tokenizer {path}")
    words = _lines(path)
    cased = any(word != word.lower() for word in words if not word.startswith("["))
    missing = {"[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"} - set(words)
    if missing:
        raise ValueError(
            f"{path} is not a WordPiece vocabulary with one token per line: "
            f"{', '.join(sorted(missing))} is missing."
        )
    with named(path):
        model = library.BertWordPieceTokenizer(
            {w: i for i, w in enumerate(words)}, lowercase=not cased
        )
    return _of_library(model._tokenizer, path, name)


def _lines(path: Path) -> list[str]:
    if path.stat().st_size > LARGEST:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; a vocabulary has at most {LARGEST}."
        )
    try:
        # Not splitlines, which also splits at U+2028, a word of some vocabularies.
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): take its UTF-8 form.") from error


def _check_added(model: Any, stated: list[Any], path: Path) -> None:
    """Refuses added tokens whose ids the library would change.

    It numbers them anew from the size of the vocabulary.
    """
    for token in stated:
        number = model.token_to_id(token["content"])
        if number != token["id"]:
            raise ValueError(
                f"{path} says that the added token {token['content']!r:.40} has the id "
                f"{token['id']!r:.20}, but the library tokenizers gives it {number}: write the "
                "file again with the token in the model's vocabulary, or without a gap before its "
                "id."
            )


def _of_library(model: Any, path: Path, name: str) -> Tokenizer:
    def first(names: Iterable[str]) -> int | None:
        return next((n for n in map(model.token_to_id, names) if n is not None), None)

    end, ids = first(_END), list(model.get_vocab(with_added_tokens=True).values())
    size = size_of(ids, path)
    if end is None:
        raise ValueError(
            f"{path} has no token that ends a document: add one of {', '.join(_END)} as a special "
            "token."
        )
    pad, encoder = first(_PAD), _of_text_alone(model, path)
    bytes_ = _byte_pieces(encoder)

    def encode(text: str) -> np.ndarray:
        with named(path):
            found = encoder.encode(text, add_special_tokens=False)
            ids = _spelled_out(found, text, bytes_, encoder) if "<0x" in text else found.ids
        return storage.narrow(ids, np.int32, str(path))

    def decode(tokens: list[int]) -> str:
        with named(path):
            return model.decode(tokens, skip_special_tokens=False)

    return Tokenizer(
        name,
        hash_of((path,)),
        size,
        encode,
        total(decode, ids, size),
        end=end,
        pad=end if pad is None else pad,
        begin=first(_BEGIN),
        mask=first(_MASK),
        files=(path,),
        rules=_RULES,
    )


def _of_text_alone(model: Any, path: Path) -> Any:
    """The same tokenizer with special tokens renamed, so that no text spells them.

    The library's `encode_special_tokens` is not enough: it ignores the added tokens, but Unigram,
    WordLevel, and BPE with `ignore_merges` still find special tokens as words of the vocabulary.
    """
    spec = json.loads(model.to_str())
    spec["post_processor"] = None  # unused, and it names special tokens
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    special |= {n for n in (*_END, *_BEGIN, *_PAD, *_MASK) if model.token_to_id(n) is not None}
    special |= _unknown(spec["model"])
    hidden = secrets.token_hex(16)  # in lower case, which normalizers keep
    renamed = {name: f"{hidden}{i}" for i, name in enumerate(sorted(special))}
    for token in spec["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    _rename(spec["model"], renamed)
    with named(path):
        made = type(model).from_str(json.dumps(spec))
    if any(model.token_to_id(old) != made.token_to_id(new) for old, new in renamed.items()):
        raise ValueError(f"{path} has special tokens whose ids the library would change.")
    return made


def _byte_pieces(encoder: Any) -> set[int]:
    """Ids of the tokens <0x00> to <0xFF> of a Unigram model, which text may spell; else empty."""
    if type(encoder.model).__name__ != "Unigram":
        return set()
    return {encoder.token_to_id(f"<0x{byte:02X}>") for byte in range(256)} - {None}


def _spelled_out(found: Any, text: str, bytes_: set[int], encoder: Any) -> list[int]:
    """The ids, with each byte token that the text spelled replaced by its six characters' ids."""
    ids: list[int] = []
    for token, (first, last) in zip(found.ids, found.offsets, strict=True):
        if token in bytes_ and text[first:last].lstrip().startswith("<0x"):
            pieces = (encoder.model.tokenize(letter) for letter in text[first:last])
            ids += [piece.id for letter in pieces for piece in letter]
        else:
            ids.append(token)
    return ids


def _unknown(model: dict[str, Any]) -> set[str]:
    """The token for unknown words, which is special too."""
    if model["type"] == "Unigram":
        return set() if model["unk_id"] is None else {model["vocab"][model["unk_id"]][0]}
    return {model["unk_token"]} - {None}


def _rename(model: dict[str, Any], renamed: dict[str, str]) -> None:
    """Renames tokens of a model, and drops the merges that make or use them."""
    if model["type"] == "Unigram":
        model["vocab"] = [[renamed.get(word, word), score] for word, score in model["vocab"]]
        return
    model["vocab"] = {renamed.get(word, word): number for word, number in model["vocab"].items()}
    if model.get("unk_token"):
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        inner = model["continuing_subword_prefix"] or ""
        model["merges"] = [
            (a, b)
            for a, b in model["merges"]
            if not {a, b, a + b.removeprefix(inner)} & renamed.keys()
        ]
