"""Writes a run as a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

from models import DecoderConfig, EncoderConfig, huggingface
from models.reading import read_json
from models.weights import inside
from models.writing import replace_text
from train import files, inputs
from train.checkpoint import classes, moved
from train.checkpoint.warm_start import LoadedRun
from train.config.schema import Config
from train.convert.class_names import class_names
from train.data import tokenizers
from train.data.config import PRETRAINED
from train.data.tokenizers import Tokenizer, for_transformers


def export(folder: Path, output: Path, loaded: LoadedRun) -> list[str]:
    """Writes a run's model and tokenizer as a folder that `transformers` loads.

    An imported run gets back the special tokens, class order and tokenizer of its source.

    Args:
      folder: of the run.
      output: the folder to write; a model in it is replaced.
      loaded: the run.

    Returns:
      Notes for the user.

    Raises:
      ValueError: the tokenizer cannot be read, or no model of `transformers` computes this one.
    """
    config, tokenizer = loaded.config, inputs.load_tokenizer(loaded.config)
    kept = _kept(folder, config)
    own = _has_tokenizer(kept, tokenizer)
    notes = huggingface.read_notes(kept) if kept.is_dir() else huggingface.Notes({}, ())
    ids = special_ids(tokenizer) | (notes.ids if own else {})
    names, messages = _class_names(config)
    params = loaded.params
    if names and (numbers := classes.order(notes.class_names, names)):
        names, params = notes.class_names, classes.permuted(params, numbers)
    huggingface.save(params, config.model, output, ids=ids, class_names=names)
    for name in for_transformers.KEPT:
        (output / name).unlink(missing_ok=True)
    if own:
        for_transformers.copy(kept, output)
    elif tokenizer.files or tokenizer.name == "bytes":
        encoder = isinstance(config.model, EncoderConfig)
        for_transformers.write(tokenizer, output, length=config.model.context, encoder=encoder)
    else:
        messages.append(f"the tokenizer {tokenizer.name} has no files: {output} has none")
    stated = output / "generation_config.json"
    if isinstance(config.model, DecoderConfig) and not stated.exists():
        some = {key: ids[key] for key in special_ids(tokenizer)}
        replace_text(stated, json.dumps(some, indent=2) + "\n")
    return messages


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of the begin, end and padding tokens; None for each where the tokens are unknown."""
    if tokenizer.end < 0:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    begin = tokenizer.end if tokenizer.begin is None else tokenizer.begin
    roles = {"bos": begin, "eos": tokenizer.end, "pad": tokenizer.pad}
    return {f"{role}_token_id": number for role, number in roles.items()}


def _kept(folder: Path, config: Config) -> Path:
    """The files kept from the source of an imported run, or of the imported run it started from."""
    own, other = files.inside(folder, PRETRAINED), Path(config.data.tokenizer).expanduser()
    return other if other.name == PRETRAINED and not own.exists() else own


def _has_tokenizer(kept: Path, tokenizer: Tokenizer) -> bool:
    """Whether a run still has the tokenizer that it was imported with."""
    path = kept / "tokenizer.json"
    if not path.is_file():
        return False
    if tokenizer.name == "bytes":
        return for_transformers.is_bytes(read_json(inside(kept, path.name)))
    return tokenizers.load(str(path)).hash == tokenizer.hash


def _class_names(config: Config) -> tuple[tuple[str, ...], list[str]]:
    """(class names, notes for the user); no names where the data cannot be read."""
    if config.data.task != "classify":
        return (), []
    try:
        with moved.explained(config):
            return class_names(config), []
    except (OSError, ValueError) as error:
        return (), [f"classes are written as LABEL_0, LABEL_1, ...: {error}"]
