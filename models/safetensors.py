"""The safetensors file format, in NumPy: a JSON header, then raw bytes.

    uint64 length of the header | {"name": {"dtype", "shape", "data_offsets"}, ...} | data

Numbers are little-endian, arrays in C order, and the data has neither gaps nor overlaps. Unlike a
pickle such a file can run nothing, so what is left to check is that its sizes agree.

Source: the format's page, huggingface.co/docs/safetensors.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

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
_LONGEST_HEADER = 100_000_000  # that of the reference implementation


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file, mapped from it: bytes are read when they are used.

    Raises:
      ValueError: the file is torn, or no safetensors file, or has a dtype that NumPy lacks.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(_broken(path, f"its header of {length} bytes exceeds its {size}"))
        try:
            header = json.loads(file.read(length))
            entries = {
                name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                _broken(path, f"its header has {type(error).__name__}: {error}")
            ) from error
    _check_offsets(path, entries, size - 8 - length)
    if size == 8 + length:  # which cannot be mapped
        data = np.zeros(0, np.uint8)
    else:
        data = np.asarray(np.memmap(path, np.uint8, "r", 8 + length))
    return {
        name: data[begin:end].view(dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in entries.items()
    }


def _check_offsets(path: str | Path, entries: dict[str, tuple], size: int) -> None:
    """Each array has the bytes of its shape, and begins where the one before it ends."""
    place = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda x: x[1][2:]):
        numbers = (*shape, begin, end)
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError(_broken(path, f"{name} has sizes {numbers}"))
        if begin != place or end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(_broken(path, f"{name}, {shape}, lies at {begin} to {end}"))
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
    whole = Path(path).with_suffix(".tmp")
    with whole.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in sorted(arrays.items()):
            file.write(array.tobytes())
    os.replace(whole, path)
