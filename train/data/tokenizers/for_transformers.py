"""Tokenizer files of `transformers`: writes them for our tokenizers, and copies its own."""

import json
from pathlib import Path
from typing import Any

from models.reading import LARGEST, read_json
from models.weights import inside
from models.writing import replace, replace_text
from train.data import embedded
from train.data.tokenizers.gpt2 import byte_characters
from train.data.tokenizers.vocabulary import Tokenizer
from train.extras import need

KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
"""Files that an imported run keeps, and that its export contains unchanged."""
_BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_PLAIN = {"type": "ByteLevel"}  # a post-processor that adds no token
_BYTES_WITH_A_ROLE = (0, 2, 3, 26)


def copy(source: Path, target: Path) -> None:
    """Copies those files of `KEPT` that a folder has.

    Raises:
      ValueError: one is a link out of its folder, or too large.
    """
    for name in KEPT:
        if not (source / name).is_file():
            continue
        path = inside(source, name)
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, but {LARGEST} may be read.")
        data = path.read_bytes()
        replace(target / name, lambda temporary, data=data: temporary.write_bytes(data))


def write(tokenizer: Tokenizer, folder: Path, *, length: int, encoder: bool) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
      tokenizer: one with `is_text`.
      folder: an existing folder.
      length: the longest sequence of the model.
      encoder: whether rows are put between [CLS] and [SEP], or the tokens in their roles.

    Raises:
      ValueError: the library `tokenizers` is missing, or would give other tokens.
    """
    spec = specification(tokenizer) | {"truncation": None, "padding": None}
    content = _contents(spec)
    begin = tokenizer.end if tokenizer.begin is None else tokenizer.begin
    roles = {"bos": begin, "eos": tokenizer.end, "pad": tokenizer.pad}
    if encoder:
        roles |= {"cls": begin, "sep": tokenizer.end, "mask": tokenizer.mask}
        if (spec.get("post_processor") or _PLAIN)["type"] == _PLAIN["type"]:
            spec["post_processor"] = _between(content, begin, tokenizer.end)
    special = {f"{role}_token": content[i] for role, i in roles.items() if i is not None}
    if "[UNK]" in content.values():
        special["unk_token"] = "[UNK]"
    stated = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer": spec, "tokenizer_config": stated, "special_tokens_map": special}
    for name, value in files.items():
        text = json.dumps(value, indent=None if name == "tokenizer" else 2, ensure_ascii=False)
        replace_text(folder / f"{name}.json", text + "\n")


def specification(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer.

    Raises:
      ValueError: as in `write`.
    """
    if tokenizer.name == "bytes":
        return bytes_specification()
    if len(tokenizer.files) == 1 and tokenizer.files[0].suffix == ".json":
        return read_json(tokenizer.files[0])
    library = need("tokenizers", "data", f"writing the tokenizer {tokenizer.name}")
    if len(tokenizer.files) == 1:
        model = word_pieces(library, tokenizer.files[0], {})
    else:
        vocabulary, merges = tokenizer.files
        model = byte_pairs(library, vocabulary, merges, {})
    text = embedded.decode(embedded.shakespeare().heldout) + "Ünïcödé, 中文 и\t\n don't  stop 3,141"
    if model.encode(text, add_special_tokens=False).ids != tokenizer.encode(text).tolist():
        raise ValueError(
            f"{tokenizer.name} gives other tokens as a tokenizer.json: give the run a "
            "tokenizer.json."
        )
    return json.loads(model.to_str())


def bytes_specification() -> dict[str, Any]:
    """A tokenizer.json whose token i is byte i.

    Bytes with a role are written as themselves and not as the letters that stand for bytes in
    GPT-2's files, because `transformers` searches texts for special tokens by name.
    """
    names = byte_characters() | {byte: chr(byte) for byte in _BYTES_WITH_A_ROLE}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    added = [
        {"id": byte, "content": chr(byte), **dict.fromkeys(flags, False), "special": True}
        for byte in _BYTES_WITH_A_ROLE
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel"} | _BYTE_LEVEL,
        "post_processor": None,
        "decoder": {"type": "ByteLevel"} | _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": {names[byte]: byte for byte in range(256)}, "merges": []},
    }


def is_bytes(spec: dict[str, Any]) -> bool:
    """Whether a tokenizer.json gives the tokens of `bytes_specification`."""
    model, before = spec.get("model"), spec.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(before, dict):
        return False
    ours = bytes_specification()
    fits = model.get("vocab") == ours["model"]["vocab"] and model.get("merges") == []
    added = json.dumps(spec.get("added_tokens")) == json.dumps(ours["added_tokens"])
    plain = before.get("type") == "ByteLevel" and before.get("add_prefix_space") is False
    return fits and added and plain and spec.get("normalizer") is None


def byte_pairs(library: Any, vocabulary: Path, merges: Path, stated: dict[str, Any]) -> Any:
    """GPT-2's tokenizer as an object of the library, from its two files."""
    model = library.ByteLevelBPETokenizer.from_file(
        str(vocabulary), str(merges), add_prefix_space=stated.get("add_prefix_space") is True
    )
    model.add_special_tokens(["<|endoftext|>"])
    return model


def word_pieces(library: Any, vocabulary: Path, stated: dict[str, Any]) -> Any:
    """BERT's tokenizer as an object of the library.

    It lowers the case as stated; by default if the vocabulary has no capitals.
    """
    words = vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    cased = any(word != word.lower() for word in words if not word.startswith("["))
    return library.BertWordPieceTokenizer(
        {word: i for i, word in enumerate(words)},
        lowercase=stated.get("do_lower_case", not cased) is True,
        strip_accents=stated.get("strip_accents"),
        handle_chinese_chars=stated.get("tokenize_chinese_chars", True) is True,
    )


def _contents(spec: dict[str, Any]) -> dict[int, str]:
    """Id -> content of each token of a tokenizer.json."""
    vocab, added = spec["model"]["vocab"], spec.get("added_tokens") or []
    named = vocab.items() if isinstance(vocab, dict) else [(w[0], i) for i, w in enumerate(vocab)]
    added = {token["id"]: token["content"] for token in added}
    return {number: name for name, number in named} | added


def _between(content: dict[int, str], begin: int, end: int) -> dict[str, Any]:
    """The post-processor that puts a text, or a pair, between two tokens."""

    def special(number: int, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": content[number], "type_id": kind}}

    def text(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    single = [special(begin, 0), text("A", 0), special(end, 0)]
    used = {
        content[n]: {"id": content[n], "ids": [n], "tokens": [content[n]]} for n in (begin, end)
    }
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), special(end, 1)],
        "special_tokens": used,
    }
