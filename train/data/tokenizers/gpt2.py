"""GPT-2's tokenizer from OpenAI's two files, by tiktoken.

The library `tokenizers` gives the same ids, five to nine times slower and with 160 bytes of memory
per byte of a document, where tiktoken takes two and a half.
"""

import importlib
from pathlib import Path

import numpy as np

from models.reading import read_json
from train.data import storage
from train.data.tokenizers.vocabulary import GPT2_FILES, Tokenizer, hash_of, named, size_of, total
from train.extras import need

_END = "<|endoftext|>"


def load(folder: Path, name: str) -> Tokenizer:
    """The tokenizer of a folder with `encoder.json` and `vocab.bpe`.

    Tokens of `encoder.json` that no merge makes, such as added ones, are decoded but never encoded.

    Raises:
      ValueError: the library is missing, or the two files are of different tokenizers.
    """
    tiktoken = need("tiktoken", "data", "GPT-2's tokenizer")
    files = tuple(folder / file for file in GPT2_FILES)
    numbers = read_json(files[0])
    size_of(numbers.values(), files[0])
    ranks, special = _parts(numbers, _merges(files[1]), files)
    end = special.setdefault(_END, size_of(numbers.values(), files[0]))
    ids = [*ranks.values(), *special.values()]
    size = size_of(ids, files[0])
    openai = importlib.import_module("tiktoken_ext.openai_public")
    with named(files[0]):
        encoding = tiktoken.Encoding(
            "gpt2", pat_str=openai.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
        )

    def encode(text: str) -> np.ndarray:
        # Text that spells <|endoftext|> is encoded as text.
        found = encoding.encode_to_numpy(text, disallowed_special=())
        return storage.narrow(found, np.int32, str(files[0]))

    return Tokenizer(
        name,
        hash_of(files),
        size,
        encode,
        total(encoding.decode, ids, size),
        end=end,
        pad=end,
        files=files,
    )


def byte_characters() -> dict[int, str]:
    """Byte -> the printable character that stands for it in GPT-2's files."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def _merges(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): take GPT-2's own file.") from error
    lines = [line.removesuffix("\r") for line in lines]
    return [line.replace(" ", "", 1) for line in lines if line and not line.startswith("#version")]


def _parts(
    numbers: dict[str, int], pairs: list[str], files: tuple[Path, ...]
) -> tuple[dict[bytes, int], dict[str, int]]:
    """The tokens that text is encoded to, as bytes -> id, and the others, as name -> id."""
    characters = {character: byte for byte, character in byte_characters().items()}
    if {numbers.get(character) for character in characters} != set(range(256)) or [
        numbers.get(pair) for pair in pairs
    ] != list(range(256, 256 + len(pairs))):
        raise ValueError(
            f"{files[1]} and {files[0]} do not belong together: the bytes must be tokens 0 to 255, "
            "merge i token 256 + i. Take both from one copy of GPT-2's tokenizer."
        )
    made = set(characters) | set(pairs)
    unknown = next((pair for pair in pairs if not set(pair) <= set(characters)), None)
    if unknown is not None:
        raise ValueError(
            f"{files[1]} merges {unknown!r:.40}, which has characters that stand for no byte: take "
            "GPT-2's own file."
        )
    ranks = {bytes(characters[c] for c in token): numbers[token] for token in made}
    return ranks, {token: number for token, number in numbers.items() if token not in made}
