"""Safetensors files as NumPy arrays, by the library `safetensors`; messages name the file.

Unlike a pickle, such a file can run nothing. The library checks that sizes and offsets agree.
"""

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from models import writing

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
_MOST_AXES = 32  # limit of older NumPy versions
_LARGEST = 2**63 - 1  # bytes of an array, empty axes not counted


class Tensor(NamedTuple):
    """A tensor of an open file: `read` copies its values from the mapped file into memory."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    opened: Any  # safetensors.safe_open

    def read(self) -> np.ndarray:
        """The values, in their own dtype."""
        return self.opened.get_tensor(self.name)


def open_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by name; reads the header only.

    Raises:
      ValueError: the file is cut, damaged or of another format, or has a dtype that NumPy lacks.
    """
    try:
        opened: Any = safetensors.safe_open(path, "numpy")
    except safetensors.SafetensorError as error:  # which names neither the file nor a cure
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). Fetch it again."
        ) from error
    return {name: _tensor(name, Path(path), opened) for name in opened.keys()}  # noqa: SIM118


def read(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a file, in memory.

    Raises:
      ValueError: as in `open_file`.
    """
    return {name: tensor.read() for name, tensor in open_file(path).items()}


def write(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a file; an existing file is replaced in one step, when all is written."""
    # The library writes the memory behind an array, whatever its strides.
    dense = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    metadata = {"format": "pt"}  # transformers demands it
    writing.replace(Path(path), lambda temporary: save_file(dense, temporary, metadata))


def _tensor(name: str, path: Path, opened: Any) -> Tensor:
    stated = opened.get_slice(name)
    dtype, shape = stated.get_dtype(), tuple(stated.get_shape())
    if dtype not in DTYPES:
        raise ValueError(
            f"{path}: the dtype of {name!r:.80} is {dtype}, but only {', '.join(DTYPES)} are read: "
            "load the model with transformers as float32 or bfloat16 and save it again."
        )
    size = math.prod(axis or 1 for axis in shape) * np.dtype(DTYPES[dtype]).itemsize
    if len(shape) > _MOST_AXES or size > _LARGEST:
        raise ValueError(
            f"{path} is damaged: {name!r:.80} has shape {reprlib.repr(shape)}, which no array can "
            "have. Fetch it again."
        )
    return Tensor(name, path, shape, np.dtype(DTYPES[dtype]), opened)
