"""Reads JSON from other programs: the size is bounded first, and errors name the file."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HALF = r"\\u[dD][89a-fA-F]"
_HALVES: dict[type, Any] = {str: re.compile(_HALF), bytes: re.compile(_HALF.encode())}
LARGEST = 64 * 2**20
"""Largest JSON file in bytes; the largest tokenizer.json files have about 30 MB."""


def read_json(path: str | Path, *, limit: int = LARGEST) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Args:
      path: of the file.
      limit: largest size in bytes; a larger file is not read at all.

    Raises:
      ValueError: the file is too large, is not JSON, or holds no object; the message names it.
    """
    size = Path(path).stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size} bytes, but at most {limit} are read from a JSON file.")
    value = parse_json(Path(path).read_bytes(), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {value!r:.40}, not an object {{...}}: take the right file.")
    return value


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Args:
      text: a string, or bytes in UTF-8. The caller bounds its length.
      where: the file and the line; messages begin with it.

    Raises:
      ValueError: the text is not JSON, is nested too deeply, or has a number with thousands of
        digits or half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        if _HALVES[type(text)].search(text):  # half of a surrogate pair cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON ({error}): it may be cut off or damaged. Take it from its "
            "source again."
        ) from error


@contextlib.contextmanager
def fields_of(where: str | Path) -> Iterator[None]:
    """Turns errors from values of an unexpected form into a ValueError that names the file.

    >>> with fields_of("a.json"):
    ...     {"layers": "six"}["layers"] + 1
    Traceback (most recent call last):
    ...
    ValueError: a.json has a value of an unexpected form (TypeError: can only concatenate str \
(not "int") to str). Take it from its source again.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as e:
        raise ValueError(
            f"{where} has a value of an unexpected form ({type(e).__name__}: {e}). Take it from "
            "its source again."
        ) from e
