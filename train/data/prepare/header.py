"""The header of a folder of token files: written last, it marks the folder as complete."""

import json
from pathlib import Path
from typing import Any

from models.reading import fields_of, read_json
from train import files

HEADER = "header.json"
FORMAT = "sophia_optax tokens 1"
SPLITS = ("train", "heldout")
_DTYPES = ("uint8", "uint16", "uint32")


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Writes the header in one atomic step."""
    files.replace_text(folder / HEADER, json.dumps(header, indent=1) + "\n")


def read_header(folder: Path) -> dict[str, Any] | None:
    """The header of a folder of token files; None where there is none.

    Raises:
      ValueError: the header cannot be read.
    """
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
    """Raises ValueError, KeyError or TypeError for a header with missing or malformed fields."""
    if header["format"] != FORMAT or header["dtype"] not in _DTYPES:
        raise ValueError(f"format {header['format']!r:.40}, dtype {header['dtype']!r:.40}")
    tokenizer, size = header["tokenizer"], header["tokenizer"]["vocab_size"]
    if not isinstance(size, int) or not all(type(tokenizer[k]) is str for k in ("name", "hash")):
        raise TypeError("tokenizer needs name and hash as texts and vocab_size as a number")
    if not isinstance(header["request"], str):
        raise TypeError("request is not a text")
    for name in SPLITS:
        split = header["splits"][name]
        numbers = [split[key] for key in ("tokens", "bytes", "largest")]
        if not all(type(n) in (int, float) and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name} has counts that are not numbers, negative or too large")
        if type(split["tokens"]) is not int or type(split["sha256"]) is not str:
            raise TypeError(f"{name} counts its tokens by {split['tokens']!r:.40}")
