"""JSON that somebody else wrote: its size is bounded first, and every fault names its place."""

import collections
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HALF = r"\\u[dD][89a-fA-F]"
_HALVES: dict[type, Any] = {str: re.compile(_HALF), bytes: re.compile(_HALF.encode())}
LARGEST = 64 * 2**20
"""Bytes of a JSON file: the largest tokenizer.json files have about 30 MB."""


def read_json(path: str | Path, *, limit: int = LARGEST) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      path: of the file.
      limit: bytes that it may have; nothing of a longer file is read.

    Raises:
      ValueError: the file is longer, is not JSON, or holds no object; the message names it.
    """
    size = Path(path).stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size} bytes, but a JSON file may have {limit} here.")
    value = parse_json(Path(path).read_bytes(), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {value!r:.40}, not an object {{...}}: take the right file.")
    return value


def parse_json(text: str | bytes, where: str, *, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
      text: UTF-8 if these are bytes. The caller bounds its length.
      where: what the message begins with, such as the file and the line.
      unique: refuse an object that has a name twice; otherwise the last one counts.

    Raises:
      ValueError: it is not JSON, is nested too deeply, has a number of thousands of digits, or half
        of a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
        if _HALVES[type(text)].search(text):  # of a pair; alone, no text can be written with it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON ({error}): it may be cut off or damaged. Take it from its "
            "source again."
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r:.80} is there twice")
    return fields


@contextlib.contextmanager
def fields_of(where: str | Path) -> Iterator[None]:
    """Turns what goes wrong with values of unexpected form into a ValueError that names the file.

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
