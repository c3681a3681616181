"""Loads and saves models in the layout of `transformers`: `config.json` and safetensors files.

It supports GPT-2, Llama, Qwen3 and BERT, by the tables of `models.families`. It reads no pickles,
and nothing from the network.
"""

import contextlib
import dataclasses
import fnmatch
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from models import safetensors, writing
from models.config import DecoderConfig, EncoderConfig
from models.config_json import (
    ARITHMETIC,
    read_class_names,
    read_config,
    read_ids,
    write_class_names,
    write_config,
)
from models.families import Family
from models.functional import split
from models.layout import block_name, stack_blocks, unstack_blocks
from models.presets import BYTE_IDS
from models.reading import fields_of, read_json
from models.safetensors import Tensor
from models.weights import INDEX, PART, WHOLE, check, floats, inside, open_folder

__all__ = ["VOCABULARY", "Notes", "load", "read_config", "read_notes", "save", "write_config"]
VOCABULARY = ("tokens/embedding", "head/embedding", "head/bias")
"""Parameters with one row for each token, padding included."""
_OLD = {".gamma": ".weight", ".beta": ".bias"}  # names from TensorFlow in the first BERTs


class Notes(NamedTuple):
    """The parts of a `config.json` that are not in our config."""

    ids: dict[str, Any]  # such as eos_token_id -> a token, a list of tokens, or None
    class_names: tuple[str, ...]  # of a classifier, by number; empty if the file names none


def read_notes(path: str | Path) -> Notes:
    """The special tokens and class names in a folder's `config.json`.

    Raises:
      ValueError: the file is missing or malformed.
    """
    path = _config_json(Path(path))
    fields = read_json(path)
    with _naming(path):
        return Notes(read_ids(fields), read_class_names(fields) if fields.get("id2label") else ())


def load(path: str | Path, **arithmetic: Any) -> tuple[DecoderConfig | EncoderConfig, Any]:
    """Loads a model from a folder in the layout of `transformers`.

    Args:
      path: the folder, with `config.json` and safetensors files; see `models.weights`.
      **arithmetic: fields of the config that no file contains, such as `dtype` or `vocab_multiple`.

    Returns:
      (config, params): params are float32 arrays in host memory; place them with
      `jax.device_put(params, shardings)`. A `BertForPreTraining`, which has two heads, is loaded
      with its masked-language-model head.

    Raises:
      ValueError: a file, a tensor or a key is missing or superfluous, a weight is not finite, our
        models do not support the config, or `arithmetic` has a field that the file decides.
    """
    if extra := sorted(arithmetic.keys() - set(ARITHMETIC)):
        raise ValueError(
            f"{extra[0]} is decided by the file: give none but {', '.join(ARITHMETIC)}."
        )
    folder = Path(path)
    place = _config_json(folder)
    fields = read_json(place)
    with _naming(place):
        config, family, architecture = read_config(fields)
    tensors = _tensors(folder, family)
    with _naming(place):
        _check_sizes(config, family, tensors)
        shapes = _shapes(config)
    pieces = _pieces(config, family, architecture, shapes)
    _check_names(folder, set(tensors), set(pieces), family)
    for name, paths in pieces.items():
        check(name, tensors[name], _joined([shapes[p] for p in paths], paths[0], family))
    params = {}
    for name, paths in pieces.items():
        array = _ours(floats(name, tensors[name]), paths[0], family)
        params |= dict(zip(paths, np.split(array, len(paths), axis=-1), strict=True))
    config = dataclasses.replace(config, **arithmetic)
    return config, _laid_out(params, config)


def save(
    params: Any,
    config: DecoderConfig | EncoderConfig,
    path: str | Path,
    *,
    ids: Mapping[str, Any] | None = None,
    class_names: tuple[str, ...] = (),
) -> None:
    """Saves a model for `transformers` and for `load`.

    Args:
      params: float32 leaves with the structure of `split(config).init`.
      config: their config. A GPT-2 without biases is saved with biases of zero.
      path: the folder; it is created if it is missing, and a model in it is replaced.
      ids: special tokens, such as `{"eos_token_id": 3}`. The default for a vocabulary of 256 tokens
        are the byte tokens, and otherwise what `transformers` assumes for the family.
      class_names: names of a classifier's classes by number; default LABEL_0, LABEL_1, ...

    Raises:
      ValueError: no architecture of `transformers` that we know supports this config, params do not
        belong to it, or the number of names is not that of the classes.
    """
    if ids is None:
        ids = BYTE_IDS if config.vocab_size == 256 else {}
    fields = write_config(config) | read_ids(dict(ids)) | _named_classes(config, class_names)
    written, family, architecture = read_config(fields)
    flat = _flat(params)
    if (found := {p: np.shape(x) for p, x in flat.items()}) != (shapes := _shapes(config)):
        wrong = sorted(p for p in found | shapes if found.get(p) != shapes.get(p))
        raise ValueError(
            f"params are not those of this config: {wrong[0]} is {found.get(wrong[0])}, not "
            f"{shapes.get(wrong[0])}. Pass the config that the params were made with."
        )
    flat = _as_written(flat, config)
    shapes = _shapes(written)
    tensors = {}
    for name, paths in _pieces(written, family, architecture, shapes).items():
        parts = [
            np.asarray(flat[p], np.float32) if p in flat else np.zeros(shapes[p], np.float32)
            for p in paths
        ]
        tensors[name] = _ours(np.concatenate(parts, axis=-1), paths[0], family)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)  # `load` would prefer it to the file written below
    safetensors.write(folder / WHOLE, tensors)
    writing.replace_text(folder / "config.json", json.dumps(fields, indent=2) + "\n")
    for part in [file for file in folder.iterdir() if PART.fullmatch(file.name)]:
        part.unlink()


def _named_classes(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not names:
        return {}
    if len(names) != (classes := getattr(config, "classes", 0)):
        raise ValueError(f"{len(names)} class names for {classes} classes: give one for each.")
    return write_class_names(names)


def _config_json(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give a folder that transformers saved.")
    return inside(folder, "config.json")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the name of the file to errors about its values."""
    with fields_of(path):
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _check_sizes(config: Any, family: Family, tensors: Mapping[str, Tensor]) -> None:
    """Checks the config's sizes against the files, before anything of that size is allocated.

    Raises:
      ValueError: a size exceeds every axis of the tensors, or the number of blocks differs.
    """
    shapes = [tensor.shape for tensor in tensors.values() if 0 not in tensor.shape]
    longest = max((axis for shape in shapes for axis in shape), default=0)
    sizes = {field: getattr(config, field) for field in family.keys if field != "layers"}
    if getattr(config, "positions", "learned") == "rope":
        del sizes["context"]  # no parameter has an axis of positions
    for field, size in sizes.items():
        if type(size) is int and size > longest:
            raise ValueError(
                f"{family.keys[field]}={size}, but the longest axis of a tensor has {longest}: "
                "take config.json and weights from one source."
            )
    before = next(name for name in family.tensors.values() if "*" in name).partition("*")[0]
    blocks = {n.removeprefix(before).partition(".")[0] for n in tensors if n.startswith(before)}
    if len(blocks) != config.layers:
        raise ValueError(
            f"{family.keys['layers']}={config.layers}, but the weights have {len(blocks)} blocks "
            f"{before}*: take config.json and all parts of the weights from one source."
        )


def _shapes(config: DecoderConfig | EncoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter; only one block is traced, since all have the same shapes."""
    one = split(dataclasses.replace(config, layers=1))
    shapes, first = {}, f"blocks/{block_name(0)}/"
    for path, leaf in _flat(jax.eval_shape(one.init, jax.random.key(0))).items():
        if path.startswith(first):
            names = map(block_name, range(config.layers))
            shapes |= {path.replace(first, f"blocks/{name}/"): leaf.shape for name in names}
        elif path.startswith("blocks/"):  # stacked
            shapes[path] = (config.layers, *leaf.shape[1:])
        else:
            shapes[path] = leaf.shape
    return shapes


def _flat(params: Any) -> dict[str, Any]:
    return flatten_dict(params, sep="/")


def _laid_out(flat: dict[str, np.ndarray], config: Any) -> dict[str, Any]:
    """Parameters in a file's layout -> in the config's: padded, and stacked for `scan_layers`."""
    rows = config.padded_vocab - config.vocab_size
    padded = {p: np.pad(flat[p], [(0, rows), (0, 0)][: flat[p].ndim]) for p in _tables(flat)}
    params = unflatten_dict(flat | padded, sep="/")
    return stack_blocks(params) if config.scan_layers else params


def _as_written(flat: dict[str, Any], config: Any) -> dict[str, Any]:
    """Parameters in the config's layout -> in a file's: without padding, block by block."""
    flat = flat | {p: flat[p][: config.vocab_size] for p in _tables(flat)}
    return _flat(unstack_blocks(unflatten_dict(flat, sep="/")))


def _tables(flat: dict[str, Any]) -> list[str]:
    return [path for path in VOCABULARY if path in flat]


def _pieces(config, family: Family, architecture: str, shapes) -> dict[str, list[str]]:
    """Tensor -> the parameters that it joins."""
    pieces = {}
    for ours, theirs in (family.tensors | family.heads[architecture]).items():
        for layer in range(config.layers if "*" in ours else 1):
            path = ours.replace("*", block_name(layer))
            if path in shapes:
                pieces.setdefault(theirs.replace("*", str(layer)), []).append(path)
    assert sum(map(len, pieces.values())) == len(shapes), "a parameter is in no table"
    return pieces


def _ours(array: np.ndarray, path: str, family: Family) -> np.ndarray:
    """Transposes a tensor to a parameter, or a parameter to a tensor, where the layouts differ."""
    turned = _turned(array.ndim, path, family)
    return np.ascontiguousarray(array.T) if turned else array


def _turned(axes: int, path: str, family: Family) -> bool:
    return family.transposed and axes == 2 and not path.endswith("embedding")


def _joined(shapes: list[tuple[int, ...]], path: str, family: Family) -> tuple[int, ...]:
    """The shape of a tensor that joins parameters of these shapes."""
    shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    return shape[::-1] if _turned(len(shape), path, family) else shape


def _tensors(folder: Path, family: Family) -> dict[str, Tensor]:
    """The tensors of a folder, by the current names of `transformers`."""
    tensors = open_folder(folder)
    prefix = family.prefix
    if any(name.startswith(prefix) for name in tensors):
        prefix = ""
    renamed = {}
    for name, tensor in tensors.items():
        new = prefix + name
        for suffix, now in _OLD.items():
            new = new.removesuffix(suffix) + now if new.endswith(suffix) else new
        if new in renamed:
            raise ValueError(
                f"{tensor.file} has {new!r:.80} under an older name too: remove one of them."
            )
        renamed[new] = tensor
    return renamed


def _check_names(folder: Path, found: set[str], wanted: set[str], family: Family) -> None:
    extra = {n for n in found - wanted if not any(fnmatch.fnmatch(n, p) for p in family.ignored)}
    for names, fault in ((wanted - found, "lacks"), (extra, "has an unknown tensor")):
        if names:
            raise ValueError(
                f"{folder} {fault} {min(names)!r:.80} (one of {len(names)}): its tensors do not "
                "match its config.json. Take both from one source, with all parts of the model."
            )
