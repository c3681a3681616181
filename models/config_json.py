"""Converts a `config.json` of `transformers` to our config and back, by `models.families`."""

import dataclasses
import reprlib
from typing import Any

from models.config import LARGEST, MOST, DecoderConfig, EncoderConfig
from models.families import FAMILIES, Family

OPTIONAL = ("kv_heads", "head_dim", "rope_theta", "tied", "attention_layer_scale")
"""Fields that older files lack; in GPT-2's files `ffn_width` may be absent too."""
ARITHMETIC = ("attention", "dtype", "vocab_multiple", "scan_layers", "remat")
"""Fields that no file contains, since they say how to compute: the caller of `load` sets them."""
_MOST_CLASSES = 2**20  # for which names are made up


def read_config(fields: dict[str, Any]) -> tuple[DecoderConfig | EncoderConfig, Family, str]:
    """(config, family, architecture) of a `config.json`.

    Raises:
      ValueError: a key is missing, or has a value that our models do not support.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type is {reprlib.repr(kind)}, but only {', '.join(FAMILIES)} are supported."
        )
    family = FAMILIES[kind]
    fields = fields | _rope(fields)
    for key, value in (family.fixed | {"rope_type": "default"}).items():
        if fields.get(key, value) != value:
            raise ValueError(
                f"{key}={reprlib.repr(fields[key])}, but our {kind} supports only {value!r}: use "
                "another model."
            )
    values = {field: _value(fields, key, field, family) for field, key in family.keys.items()}
    architecture = _architecture(fields, family)
    if architecture == "BertForSequenceClassification":
        values["classes"] = len(read_class_names(fields))
    return _canonical(dataclasses.replace(family.base, **values)), family, architecture


def write_config(config: DecoderConfig | EncoderConfig) -> dict[str, Any]:
    """The `config.json` of a config; classes get the default names of `transformers`.

    Raises:
      ValueError: no family supports the config.
    """
    kind, architecture = _kind(config)
    family = FAMILIES[kind]
    zeros = {name: int(x) for name, x in _defaults(config).items() if not getattr(config, name)}
    full = dataclasses.replace(config, **zeros)
    fields = {"architectures": [architecture], "model_type": kind, **family.fixed}
    fields |= {key: getattr(full, field) for field, key in family.keys.items()}
    if classes := getattr(config, "classes", 0):
        fields |= write_class_names(_unnamed(classes))
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


def read_class_names(fields: dict[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's classes by number, from `id2label`.

    Raises:
      ValueError: the classes are not numbered 0, 1, 2, ..., or a name is not a string.

    >>> read_class_names({"id2label": {"1": "good", "0": "bad"}})
    ('bad', 'good')
    """
    names, count = fields.get("id2label"), fields.get("num_labels")
    if names is None:
        if count is not None and (type(count) is not int or not 0 < count <= _MOST_CLASSES):
            raise ValueError(
                f"num_labels={reprlib.repr(count)}: it needs a number of classes, at most "
                f"{_MOST_CLASSES}."
            )
        return _unnamed(count or 2)
    numbers = [str(i) for i in range(len(names))] if isinstance(names, dict) else []
    if not numbers or names.keys() != set(numbers):
        raise ValueError(
            f"id2label={reprlib.repr(names)}: it needs a name for each class 0, 1, 2, ..."
        )
    if not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"id2label={reprlib.repr(names)}: names of classes are strings.")
    return tuple(names[number] for number in numbers)


def write_class_names(names: tuple[str, ...]) -> dict[str, Any]:
    """`id2label` and `label2id`.

    >>> write_class_names(("bad", "good"))["label2id"]
    {'bad': 0, 'good': 1}
    """
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def read_ids(fields: dict[str, Any]) -> dict[str, Any]:
    """The special tokens in a `config.json`, such as `eos_token_id`.

    Raises:
      ValueError: a value is neither a token, nor null, nor a list of tokens.

    >>> read_ids({"vocab_size": 9, "eos_token_id": [2, 3], "pad_token_id": None})
    {'eos_token_id': [2, 3], 'pad_token_id': None}
    """
    ids = {key: value for key, value in fields.items() if key.endswith("_token_id")}
    for key, value in ids.items():
        tokens = value if isinstance(value, list) else [value] if value is not None else []
        if not all(type(token) is int for token in tokens):
            raise ValueError(f"{key}={reprlib.repr(value)} is not a token: give its id, or null.")
    return ids


def _unnamed(classes: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(classes))


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters as top-level fields, whichever version wrote the file."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"the rotary parameters are {reprlib.repr(rope)}, but our models have the same for "
            "all layers: use another model."
        )
    return {"rope_type": rope.get("type", "default")} | rope


def _kind(config: DecoderConfig | EncoderConfig) -> tuple[str, str]:
    """(model_type, architecture) of the family that could support a config."""
    if isinstance(config, EncoderConfig):
        return "bert", "BertForSequenceClassification" if config.classes else "BertForMaskedLM"
    kind = "gpt2" if config.positions == "learned" else "qwen3" if config.qk_norm else "llama"
    return kind, next(iter(FAMILIES[kind].heads))


def _architecture(fields: dict[str, Any], family: Family) -> str:
    names = fields.get("architectures") or [None]
    named = names[0] if isinstance(names, list) else names
    if isinstance(named, str) and named in family.heads:
        return named
    if len(family.heads) > 1:
        raise ValueError(
            f"the architecture is {reprlib.repr(named)}, but only {', '.join(family.heads)} are "
            "supported: save the model with one of these heads."
        )
    return next(iter(family.heads))


def _defaults(config: Any) -> dict[str, float]:
    """Field -> the value that 0 stands for."""
    values = {
        "kv_heads": config.heads,
        "head_dim": config.width / config.heads,
        "ffn_width": 4 * config.width,
    }
    return {field: value for field, value in values.items() if hasattr(config, field)}


def _canonical(config: Any) -> Any:
    """The same config with 0 in place of each value that 0 stands for."""
    same = [name for name, value in _defaults(config).items() if getattr(config, name) == value]
    return dataclasses.replace(config, **dict.fromkeys(same, 0))


def _value(fields: dict[str, Any], key: str, field: str, family: Family) -> Any:
    default = getattr(family.base, field)
    value = fields.get(key)
    if value is None and (field in OPTIONAL or key == "n_inner"):
        return default
    kind, most = type(default), MOST.get(field, LARGEST)
    right = type(value) is bool if kind is bool else _is(kind, value, most)
    if not right:
        raise ValueError(
            f"{key}={reprlib.repr(value)}: it needs a value of type {kind.__name__}, not negative "
            f"and at most {most}."
        )
    return kind(value)


def _is(kind: type, value: Any, most: int) -> bool:
    """Whether a JSON value is a number of a kind; a whole float counts as an int."""
    return type(value) in (int, float) and 0 <= value <= most and kind(value) == value
