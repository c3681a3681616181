"""Damages files by a seed: flips, cuts and copies bytes, and puts odd values into JSON."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Fields = Any  # values of JSON

_DEEP = "\x00deep\x00"  # replaced by brackets nested deeper than a parser can go
AIMED: tuple[Fields, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    10**6,
    2**31,
    2**63,
    2**64,
    10**400,
    -(2**63),
    0.5,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "x",
    "x" * 10**5,
    "../../etc/passwd",
    "\ud800",
    "\x00",
    [],
    {},
    [1, 2],
    [[]],
    {"a": {"b": 1}},
    _DEEP,
)


def damaged(name: str, raw: bytes, draw: random.Random) -> bytes:
    """The contents of a file with one fault or a few; its name tells the kind of file."""
    structured = {
        ".json": of_json,
        ".jsonl": of_lines,
        ".safetensors": of_safetensors,
    }.get("." + name.rpartition(".")[2])
    if structured and draw.random() < 0.7:
        return structured(raw, draw)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        raw = draw.choice(BYTES)(raw, draw)
    return raw


def _place(raw: bytes, draw: random.Random) -> int:
    """A random position, often near an end, where headers and footers are."""
    near = draw.randrange(64)
    return min(len(raw), draw.choice((draw.randrange(len(raw) + 1), near, max(0, len(raw) - near))))


def flip(raw: bytes, draw: random.Random) -> bytes:
    """Flips a bit."""
    place, bit = _place(raw, draw), 1 << draw.randrange(8)
    return raw[:place] + bytes(byte ^ bit for byte in raw[place : place + 1]) + raw[place + 1 :]


def cut(raw: bytes, draw: random.Random) -> bytes:
    """Cuts off the end."""
    return raw[: _place(raw, draw)]


def remove(raw: bytes, draw: random.Random) -> bytes:
    """Removes a piece."""
    first, size = _place(raw, draw), draw.choice((1, 2, 4, 8, 100))
    return raw[:first] + raw[first + size :]


def double(raw: bytes, draw: random.Random) -> bytes:
    """Repeats a piece, or the whole."""
    first, last = sorted((_place(raw, draw), _place(raw, draw)))
    return raw[:last] + raw[first:]


def splice(raw: bytes, draw: random.Random) -> bytes:
    """Overwrites a piece with another one."""
    first, other, size = _place(raw, draw), _place(raw, draw), draw.randrange(1, 65)
    return raw[:first] + raw[other : other + size] + raw[first + size :]


def insert(raw: bytes, draw: random.Random) -> bytes:
    """Inserts bytes."""
    place = _place(raw, draw)
    what = draw.choice(
        (
            b"\x00",
            b"\xff" * 8,
            b"9" * 30,
            b"-1",
            b"1e999",
            b"NaN",
            b'"',
            b"\n",
            b"[" * 99,
            b"\xed\xa0",
        )
    )
    return raw[:place] + what + raw[place:]


def overwrite(raw: bytes, draw: random.Random) -> bytes:
    """Overwrites a number with the largest, the smallest or zero."""
    place, size = _place(raw, draw), draw.choice((1, 2, 4, 8))
    what = draw.choice((b"\x00", b"\xff", b"\x7f", b"\x80"))
    return raw[:place] + what * size + raw[place + size :]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip,
    flip,
    cut,
    remove,
    double,
    splice,
    insert,
    overwrite,
)


def of_json(raw: bytes, draw: random.Random) -> bytes:
    """Changes, removes, copies or retypes a value of a JSON text."""
    value = json.loads(raw)
    for _ in range(draw.choice((1, 1, 2))):
        value = _changed(value, draw)
    return _written(value)


def of_lines(raw: bytes, draw: random.Random) -> bytes:
    """Changes one line of JSON lines."""
    lines = raw.splitlines()
    place = draw.randrange(len(lines))
    lines[place] = of_json(lines[place], draw)
    return b"\n".join(lines) + b"\n"


def of_safetensors(raw: bytes, draw: random.Random) -> bytes:
    """Changes the header of a safetensors file, and states its new length."""
    size = int.from_bytes(raw[:8], "little")
    header = of_json(raw[8 : 8 + size], draw)
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


def _written(value: Fields) -> bytes:
    text = json.dumps(value).replace(json.dumps(_DEEP), "[" * 10**5 + "]" * 10**5)
    return text.encode()


def _changed(value: Fields, draw: random.Random) -> Fields:
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or draw.random() < 0.02:
        return draw.choice(AIMED)
    holder, key = draw.choice(places)
    action = draw.choice(("aim", "aim", "aim", "delete", "retype", "copy", "rename"))
    if action == "delete":
        del holder[key]
    elif action == "retype":
        holder[key] = draw.choice((str, lambda v: [v], lambda v: {"a": v}, bool))(holder[key])
    elif action == "copy":
        other, place = draw.choice(places)
        holder[key] = copy.deepcopy(other[place])
    elif action == "rename" and isinstance(holder, dict):
        holder[draw.choice(("", "x", f"{key}_", "__proto__"))] = holder.pop(key)
    else:
        holder[key] = draw.choice(AIMED)
    return value


def _places(value: Fields) -> Any:
    """(dict or list, key) of each nested value; only the first hundred of a long list or dict."""
    if isinstance(value, dict | list):
        keys = list(value if isinstance(value, dict) else range(len(value)))[:100]
        for key in keys:
            yield value, key
            yield from _places(value[key])


def memory(what: str, *, reset: bool = False) -> int:
    """Resident bytes now, or at most since the last reset; 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(l.split()[1]) * 1024 for l in lines if l.startswith(what)), 0)
