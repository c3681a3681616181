"""Weights from and for `transformers`: folders of `config.json` and safetensors files.

GPT-2, Llama, Qwen3 and BERT, by the tables of `models.families`. Reads no pickle, and nothing from
the network.
"""

import dataclasses
import fnmatch
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from models import safetensors
from models.config import DecoderConfig, EncoderConfig
from models.families import FAMILIES, Family
from models.functional import split
from models.layout import block_name, stack_blocks, unstack_blocks

OPTIONAL = ("kv_heads", "head_dim", "rope_theta", "tied", "attention_layer_scale")
"""Fields that older files lack; `ffn_width` is one in GPT-2's."""
ARITHMETIC = ("attention", "dtype", "vocab_multiple", "scan_layers", "remat")
"""Fields that are no part of a file: how to compute is up to who loads it."""
VOCABULARY = ("tokens/embedding", "head/embedding", "head/bias")
"""Parameters with a row for each token, and for padding."""


def load(path: str | Path, **arithmetic: Any) -> tuple[DecoderConfig | EncoderConfig, Any]:
    """A model from a folder in the layout of `transformers`.

    Args:
      path: the folder, with `config.json` and `model.safetensors` or its numbered parts.
      **arithmetic: fields of the config that no file has, such as `dtype` or `vocab_multiple`.

    Returns:
      (config, params): params in float32 and in host memory, so place them with
      `jax.device_put(params, shardings)`. Of a BERT that was trained on two tasks
      (`BertForPreTraining`) it has the masked-language-model head.

    Raises:
      ValueError: the folder lacks a file, a tensor or a key, has one too many, or asks for what
        our models do not compute; or a field that the file decides is given.
    """
    if extra := sorted(arithmetic.keys() - set(ARITHMETIC)):
        raise ValueError(
            f"{extra[0]} is decided by the file: give none but {', '.join(ARITHMETIC)}."
        )
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give a folder that transformers saved.")
    fields = _json(folder / "config.json")
    config, family, architecture = read_config(fields)
    shapes = _shapes(config)
    pieces = _pieces(config, family, architecture, shapes)
    tensors = _tensors(folder, family)
    _check_names(folder, set(tensors), set(pieces), family)
    params = {}
    for name, paths in pieces.items():
        array = np.array(tensors[name], np.float32)
        parts = np.split(_ours(array, paths[0], family), len(paths), axis=-1)
        params |= dict(zip(paths, parts, strict=True))
    wrong = [p for p, x in params.items() if x.shape != shapes[p]]
    if wrong:
        raise ValueError(
            f"{folder} does not fit its config.json: {wrong[0]} is {params[wrong[0]].shape}, not "
            f"{shapes[wrong[0]]}. Take both files from one source."
        )
    config = dataclasses.replace(config, **arithmetic)
    return config, _laid_out(params, config)


def save(params: Any, config: DecoderConfig | EncoderConfig, path: str | Path) -> None:
    """Writes a model that `transformers` and `load` read.

    Args:
      params: float32 leaves, as `split(config).init` makes them.
      config: their config. GPT-2 without biases is written with biases of zero.
      path: the folder, made if it is missing; a model in it is replaced.

    Raises:
      ValueError: no architecture of `transformers` that we know computes this config, or params
        are another config's.
    """
    fields = write_config(config)
    written, family, architecture = read_config(fields)
    flat = _flat(params)
    if (found := {p: np.shape(x) for p, x in flat.items()}) != (shapes := _shapes(config)):
        wrong = sorted(p for p in found | shapes if found.get(p) != shapes.get(p))
        raise ValueError(
            f"params are not those of this config: {wrong[0]} is {found.get(wrong[0])}, not "
            f"{shapes.get(wrong[0])}. Pass the config that they were made with."
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
    Path(path).mkdir(parents=True, exist_ok=True)
    safetensors.write(Path(path) / "model.safetensors", tensors)
    (Path(path) / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): take it from its source again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no settings, but {fields!r:.40}.")
    return fields


def read_config(fields: dict[str, Any]) -> tuple[DecoderConfig | EncoderConfig, Family, str]:
    """(config, family, architecture) of a `config.json`.

    Raises:
      ValueError: a key is missing, or has a value that our models do not compute.
    """
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r}, but there are only {', '.join(FAMILIES)}.")
    family = FAMILIES[kind]
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    fields = {"rope_type": rope.get("type", "default")} | fields | rope
    for key, value in (family.fixed | {"rope_type": "default"}).items():
        if fields.get(key, value) != value:
            raise ValueError(
                f"config.json has {key}={fields[key]!r}, but our {kind} computes {value!r} alone: "
                "use another model."
            )
    values = {field: _value(fields, key, field, family) for field, key in family.keys.items()}
    architecture = _architecture(fields, family)
    if architecture == "BertForSequenceClassification":
        values["classes"] = len(fields.get("id2label") or ()) or fields.get("num_labels") or 2
    return _canonical(dataclasses.replace(family.base, **values)), family, architecture


def write_config(config: DecoderConfig | EncoderConfig) -> dict[str, Any]:
    """The `config.json` of a config.

    Raises:
      ValueError: no family computes what the config does.
    """
    kind, architecture = _kind(config)
    family = FAMILIES[kind]
    zeros = {name: int(x) for name, x in _defaults(config).items() if not getattr(config, name)}
    full = dataclasses.replace(config, **zeros)
    fields = {"architectures": [architecture], "model_type": kind, **family.fixed}
    fields |= {key: getattr(full, field) for field, key in family.keys.items()}
    if classes := getattr(config, "classes", 0):
        fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(classes)}
        fields["label2id"] = {f"LABEL_{i}": i for i in range(classes)}
    written, config = read_config(fields)[0], _canonical(config)
    lost = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(written, field.name)
        and field.name not in (*ARITHMETIC, *(["bias"] if kind == "gpt2" else []))
    ]
    if lost:
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(f"no {architecture} has {values}: transformers cannot compute this model.")
    return fields


def _kind(config: DecoderConfig | EncoderConfig) -> tuple[str, str]:
    """(model_type, architecture) of the family that may compute a config."""
    if isinstance(config, EncoderConfig):
        return "bert", "BertForSequenceClassification" if config.classes else "BertForMaskedLM"
    kind = "gpt2" if config.positions == "learned" else "qwen3" if config.qk_norm else "llama"
    return kind, next(iter(FAMILIES[kind].heads))


def _architecture(fields: dict[str, Any], family: Family) -> str:
    named = next(iter(fields.get("architectures") or ()), None)
    if len(family.heads) > 1 and named not in family.heads:
        raise ValueError(
            f"the architecture is {named!r}, but there are only {', '.join(family.heads)}: save "
            "the model with one of these heads."
        )
    return named if named in family.heads else next(iter(family.heads))


def _defaults(config: Any) -> dict[str, float]:
    """What a 0 stands for, in the fields that may have one."""
    values = {
        "kv_heads": config.heads,
        "head_dim": config.width / config.heads,
        "ffn_width": 4 * config.width,
    }
    return {field: value for field, value in values.items() if hasattr(config, field)}


def _canonical(config: Any) -> Any:
    """The same config with 0 wherever it stands for the value."""
    same = [name for name, value in _defaults(config).items() if getattr(config, name) == value]
    return dataclasses.replace(config, **dict.fromkeys(same, 0))


def _value(fields: dict[str, Any], key: str, field: str, family: Family) -> Any:
    default = getattr(family.base, field)
    value = fields.get(key)
    if value is None and (field in OPTIONAL or key == "n_inner"):
        return default
    kind = type(default)
    if not isinstance(value, int | float) or kind(value) != value:
        raise ValueError(
            f"config.json has {key}={value!r}: it needs a value of type {kind.__name__}."
        )
    return kind(value)


def _shapes(config: DecoderConfig | EncoderConfig) -> dict[str, tuple[int, ...]]:
    abstract = jax.eval_shape(split(config).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in _flat(abstract).items()}


def _flat(params: Any) -> dict[str, Any]:
    return flatten_dict(params, sep="/")


def _laid_out(flat: dict[str, np.ndarray], config: Any) -> dict[str, Any]:
    """The parameters of a file as the config wants them: padded, and stacked."""
    rows = config.padded_vocab - config.vocab_size
    padded = {p: np.pad(flat[p], [(0, rows), (0, 0)][: flat[p].ndim]) for p in _tables(flat)}
    params = unflatten_dict(flat | padded, sep="/")
    return stack_blocks(params) if config.scan_layers else params


def _as_written(flat: dict[str, Any], config: Any) -> dict[str, Any]:
    """Parameters of the config as a file has them: without padding, block by block."""
    flat = flat | {p: flat[p][: config.vocab_size] for p in _tables(flat)}
    return _flat(unstack_blocks(unflatten_dict(flat, sep="/")))


def _tables(flat: dict[str, Any]) -> list[str]:
    return [path for path in VOCABULARY if path in flat]


def _pieces(config, family: Family, architecture: str, shapes) -> dict[str, list[str]]:
    """Tensor -> the parameters that are joined in it."""
    pieces = {}
    for ours, theirs in (family.tensors | family.heads[architecture]).items():
        for layer in range(config.layers if "*" in ours else 1):
            path = ours.replace("*", block_name(layer))
            if path in shapes:
                pieces.setdefault(theirs.replace("*", str(layer)), []).append(path)
    assert sum(map(len, pieces.values())) == len(shapes), "a parameter is in no table"
    return pieces


def _ours(array: np.ndarray, path: str, family: Family) -> np.ndarray:
    """A tensor as a parameter, or the other way round."""
    turned = family.transposed and array.ndim == 2 and not path.endswith("embedding")
    return np.ascontiguousarray(array.T) if turned else array


def _tensors(folder: Path, family: Family) -> dict[str, np.ndarray]:
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no model.safetensors: fetch it, or where there is only a pickle such as "
            "pytorch_model.bin, load that with transformers and save it again."
        )
    tensors = {}
    for file in files:
        tensors |= safetensors.read(file)
    if not any(name.startswith(family.prefix) for name in tensors):
        tensors = {family.prefix + name: array for name, array in tensors.items()}
    # As TensorFlow called them, and the first files of BERT still do.
    old = {".gamma": ".weight", ".beta": ".bias"}
    for suffix, new in old.items():
        tensors = {
            name.removesuffix(suffix) + new if name.endswith(suffix) else name: array
            for name, array in tensors.items()
        }
    return tensors


def _check_names(folder: Path, found: set[str], wanted: set[str], family: Family) -> None:
    extra = {n for n in found - wanted if not any(fnmatch.fnmatch(n, p) for p in family.ignored)}
    for names, fault in ((wanted - found, "lacks"), (extra, "has no place for")):
        if names:
            raise ValueError(
                f"{folder} {fault} {min(names)} ({len(names)} such): its tensors are not those of "
                "its config.json. Take both from one source, all parts of the model."
            )
