"""The safetensors files in a model's folder: which of them belong to the model."""

import re
import reprlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from models.reading import read_json
from models.safetensors import Tensor, open_file

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_LONGEST_NAME = 255  # bytes, of most file systems


def open_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model, by name; reads headers only.

    If there is a `model.safetensors.index.json`, each tensor comes from the file that the index
    names, and other files are ignored, even a `model.safetensors`. (`transformers` would prefer
    `model.safetensors`; where both exist and differ, one is left over from another save.) Without
    an index `model.safetensors` is read, as in `transformers`, or else the numbered parts.

    Raises:
      ValueError: there are no such files, or they are not one whole model.
    """
    if (folder / INDEX).is_file():
        return _by_index(folder)
    if (folder / WHOLE).is_file():
        return open_file(inside(folder, WHOLE))
    found: dict[str, Tensor] = {}
    for file in _parts(folder):
        for name, tensor in open_file(file).items():
            if name in found:
                raise ValueError(
                    f"{file} and {found[name].file} both have the tensor {name!r:.80}: they are of "
                    f"two saves. Remove the older one, or fetch {INDEX}, which names the files of "
                    "the model."
                )
            found[name] = tensor
    return found


def check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Checks that a tensor has floats and the shape that its model needs; reads no data.

    Raises:
      ValueError: it has another type or shape.
    """
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.file} does not fit its config.json: {name} is {tensor.shape}, not {shape}. "
            "Take both files from one source."
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(
            f"{tensor.file} has {name} as {tensor.dtype}, but weights are floats: load the "
            "quantized model with transformers, dequantize it, and save it again."
        )


def floats(name: str, tensor: Tensor) -> np.ndarray:
    """The values of a tensor as float32, in host memory.

    Raises:
      ValueError: a value is not finite.
    """
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, found below
        array = np.asarray(tensor.read(), np.float32)
    if not (finite := np.isfinite(array)).all():
        raise ValueError(
            f"{tensor.file} has {array.size - np.count_nonzero(finite)} numbers that are not "
            f"finite in float32, in {name} {array.shape}: the file is damaged or its training "
            "diverged. Fetch it again, or take an earlier save."
        )
    return array


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, which must lie in the folder, or in the `blobs` of a Hugging Face cache.

    Files in a cache's `snapshots/COMMIT` are links into the folder `blobs` beside `snapshots`.

    Raises:
      ValueError: it leads out of the folder.
    """
    path, home = folder / name, folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    plain = name.isprintable() and len(name.encode()) <= _LONGEST_NAME
    plain = plain and not Path(name).is_absolute() and ".." not in Path(name).parts
    if not (plain and any(path.resolve().is_relative_to(home) for home in homes)):
        raise ValueError(
            f"{folder} names the file {name!r:.80}, which leads out of the folder or is not a "
            "file name: copy the file into the folder, and correct the name."
        )
    return path


def _by_index(folder: Path) -> dict[str, Tensor]:
    index = inside(folder, INDEX)
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{index} has no weight_map from tensors to files: fetch it again.")
    if wrong := [file for file in named.values() if not isinstance(file, str)]:
        raise ValueError(f"{index} has {reprlib.repr(wrong[0])} as a file name: fetch it again.")
    files = {}
    for file in sorted(set(named.values())):
        path = inside(folder, file)
        if not path.is_file():
            raise ValueError(
                f"{folder} lacks {file!r:.80}, which {INDEX} names: fetch it, or remove the index "
                "if it is of an older save."
            )
        files[file] = open_file(path)
    for tensor, file in named.items():
        if tensor not in files[file]:
            raise ValueError(
                f"{index} says that {tensor!r:.80} is in {file!r:.80}, which lacks it: the files "
                "are of two saves. Take all files from one save."
            )
    return {tensor: files[file][tensor] for tensor, file in named.items()}


def _parts(folder: Path) -> list[Path]:
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    matches = [match for match in map(PART.fullmatch, names) if match]
    if not matches:
        others = f" (there is {names[0]!r:.80})" if names else ""
        raise ValueError(
            f"{folder} has no {WHOLE}{others}: fetch it. If there is only a pickle such as "
            "pytorch_model.bin, load it with transformers and save it again."
        )
    other = next((m for m in matches if m.group(1, 3) != matches[0].group(1, 3)), None)
    if other:
        raise ValueError(
            f"{folder} has parts of two saves, {matches[0][0]} and {other[0]}, and no {INDEX}: "
            "fetch the index, or remove the parts of the older save."
        )
    stem, total = matches[0].group(1, 3)
    have, count = {int(match[2]) for match in matches}, int(total)
    if have != set(range(1, count + 1)):
        absent = [number for number in range(1, count + 1) if number not in have]
        first = f"{stem}-{absent[0] if absent else 0:05}-of-{total}.safetensors"
        raise ValueError(
            f"{folder} has {len(have)} parts of {count}, {'without' if absent else 'and'} {first}: "
            f"fetch all parts of the model, and {INDEX}."
        )
    return [inside(folder, match[0]) for match in matches]
