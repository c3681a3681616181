"""The safetensors file format, in NumPy: a JSON header, then raw bytes.

    uint64 length of the header | {"name": {"dtype", "shape", "data_offsets"}, ...} | data

Numbers are little-endian, arrays in C order, and the data has neither gaps nor overlaps. Unlike a
pickle such a file can run nothing, so what is left to check is that its sizes agree.

Source: the format's page, huggingface.co/docs/safetensors.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from models import reading, writing

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MOST_AXES = 32  # of an array in older NumPy
_LARGEST = 2**63 - 1  # bytes, and elements, that NumPy counts


class Entry(NamedTuple):
    """Where an array lies in the data, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str | Path) -> tuple[dict[str, Entry], int]:
    """(the arrays of a file, where its data begins); no data is read.

    Raises:
      ValueError: the file is torn, or no safetensors file, or has a dtype that NumPy lacks.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, reading.LARGEST):
            raise ValueError(
                _broken(path, f"its header of {length} bytes exceeds its {size}, or the limit")
            )
        text = file.read(length)
    header = reading.parse_json(text, f"the header of {path}", unique=True)
    if not isinstance(header, dict):
        raise ValueError(_broken(path, f"its header is {reprlib.repr(header)}, not an object"))
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_offsets(path, entries, size - 8 - length)
    return entries, 8 + length


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file, mapped from it: bytes are read when they are used.

    Raises:
      ValueError: as in `read_header`.
    """
    entries, start = read_header(path)
    if Path(path).stat().st_size == start:  # which cannot be mapped
        data = np.zeros(0, np.uint8)
    else:
        data = np.asarray(np.memmap(path, np.uint8, "r", start))
    return {
        name: data[entry.begin : entry.end].view(DTYPES[entry.dtype]).reshape(entry.shape)
        for name, entry in entries.items()
    }


def _entry(path: str | Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        lacking = "dtype, shape and data_offsets are needed"
        raise ValueError(_broken(path, f"{name!r:.80} is {reprlib.repr(value)}: {lacking}"))
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"{path}: the dtype of {name!r:.80} is {reprlib.repr(dtype)}, but only "
            f"{', '.join(DTYPES)} are read: load the model with transformers as float32 or "
            "bfloat16 and save it again."
        )
    fits = isinstance(shape, list) and len(shape) <= _MOST_AXES and isinstance(place, list)
    if not fits or len(place) != 2 or not all(map(_is_size, (*shape, *place))):
        shown = f"shape {reprlib.repr(shape)} and offsets {reprlib.repr(place)}"
        raise ValueError(_broken(path, f"{name!r:.80} has {shown}"))
    if math.prod(axis or 1 for axis in shape) * np.dtype(DTYPES[dtype]).itemsize > _LARGEST:
        raise ValueError(_broken(path, f"{name!r:.80} has shape {reprlib.repr(shape)}"))
    return Entry(dtype, tuple(shape), *place)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST  # True is an int too


def _check_offsets(path: str | Path, entries: dict[str, Entry], size: int) -> None:
    """Each array has the bytes of its shape, and begins where the one before it ends."""
    place = 0
    for name, entry in sorted(entries.items(), key=lambda x: (x[1].begin, x[1].end)):
        dtype, shape, begin, end = entry
        if begin != place or end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            raise ValueError(
                _broken(path, f"{name!r:.80}, {dtype} {shape}, lies at {begin} to {end}")
            )
        place = end
    if place != size:
        raise ValueError(_broken(path, f"its arrays have {place} bytes of {size}"))


def _broken(path: str | Path, reason: str) -> str:
    return f"{path} is no whole safetensors file: {reason}. Fetch it again."


def write(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a file, in the order of their names; a file that was there stays whole.

    Raises:
      KeyError: a dtype that the format lacks.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers demands it
    place = 0
    for name, array in sorted(arrays.items()):
        end = place + array.nbytes
        entry = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": (place, end)}
        header[name], place = entry, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # arrays are aligned

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, array in sorted(arrays.items()):
                file.write(array.tobytes())

    writing.replace(Path(path), fill)
