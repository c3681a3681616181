"""Runs from Hugging Face folders and back: model, tokenizer, special tokens and class names."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models import PRESETS, DecoderConfig, EncoderConfig, huggingface
from models.config_json import write_class_names
from models.reading import read_json
from models.weights import inside
from models.writing import replace_text
from train import data, files, inputs, loop
from train.checkpoint import classes, moved, warm_start
from train.config import presets
from train.config.schema import Config
from train.data import DataConfig, tokenizers
from train.data.config import PRETRAINED
from train.data.tokenizers import Tokenizer, for_transformers
from train.extras import need


def begin(folder: Path, run: Path, optimizer: str, tokenizer: str, source: DataConfig) -> None:
    """Makes a run, at step 0, of the model in a Hugging Face folder.

    Args:
      folder: of the model.
      run: the folder to make.
      optimizer: a name in `OPTIMIZERS`.
      tokenizer: as in `DataConfig`; empty takes that of the folder.
      source: the data; its task is what the model does, and its tokenizer is not used.

    Raises:
      ValueError: the folder, its tokenizer or the data cannot be used, or `run` is taken.
    """
    model, _ = huggingface.load(folder)
    notes = huggingface.read_notes(folder)
    with _keeping(run) as kept:
        name = tokenizer or _adopt(folder, model, kept)
        beside = notes.ids
        made = _config(folder, run, model, optimizer, dataclasses.replace(source, tokenizer=name))
        if made.data.task == "classify":
            _check_classes(folder, made, notes.class_names)
            beside = beside | write_class_names(notes.class_names)
        replace_text(kept / "config.json", json.dumps(beside, indent=2) + "\n")
        loop.begin(made)


def export(folder: Path, output: Path, loaded: warm_start.Saved) -> list[str]:
    """Writes a run's model and tokenizer as a folder that `transformers` loads.

    An imported run's special tokens, class numbers and tokenizer are again those of its source.

    Args:
      folder: of the run.
      output: the folder to write; a model in it is replaced.
      loaded: the run.

    Returns:
      What to tell beside the result.

    Raises:
      ValueError: the tokenizer cannot be read, or no model of `transformers` computes this one.
    """
    config, tokenizer = loaded.config, inputs.load_tokenizer(loaded.config)
    kept = _kept(folder, config)
    own = _has_tokenizer(kept, tokenizer)
    notes = huggingface.read_notes(kept) if kept.is_dir() else huggingface.Notes({}, ())
    ids = _ids(tokenizer) | (notes.ids if own else {})
    names, told = _class_names(config)
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
        told.append(f"the tokenizer {tokenizer.name} has no files: {output} is without one")
    stated = output / "generation_config.json"
    if isinstance(config.model, DecoderConfig) and not stated.exists():
        some = {key: ids[key] for key in _ids(tokenizer)}
        replace_text(stated, json.dumps(some, indent=2) + "\n")
    return told


@contextlib.contextmanager
def _keeping(run: Path) -> Iterator[Path]:
    """The new folder `PRETRAINED` of a run, which is there for good if nothing is raised."""
    if (run / "config.json").exists() or (run / PRETRAINED).exists():
        raise ValueError(f"{run} already holds a run, or a part of one: choose another folder.")
    run.mkdir(parents=True, exist_ok=True)
    kept = run / PRETRAINED
    kept.mkdir()
    try:
        yield kept
    except BaseException:
        shutil.rmtree(kept)
        with contextlib.suppress(OSError):  # something else is in it
            run.rmdir()
        raise


def _config(
    folder: Path,
    run: Path,
    model: DecoderConfig | EncoderConfig,
    optimizer: str,
    source: DataConfig,
) -> Config:
    family = huggingface.write_config(model)["model_type"]
    base = next(name for name in PRESETS if name.startswith(family))
    made = presets.preset(base, optimizer)
    task = "classify" if getattr(model, "classes", 0) else made.data.task
    return dataclasses.replace(
        made,
        model=dataclasses.replace(model, scan_layers=made.model.scan_layers),
        data=dataclasses.replace(source, task=task),
        sequence_length=min(made.sequence_length, model.context),
        start_from=str(folder),
        output=dataclasses.replace(made.output, folder=str(run)),
    )


def _check_classes(folder: Path, config: Config, theirs: tuple[str, ...]) -> None:
    if config.data.source == DataConfig.source:
        raise ValueError(
            f"{folder} is a classifier of {', '.join(theirs) or 'unnamed classes'}: name labelled "
            "texts for it, such as --data.source csv:reviews.csv."
        )
    ours = _data_names(config)
    if theirs and classes.order(ours, theirs) is None:
        raise ValueError(
            f"{folder} is a classifier of {', '.join(theirs)}, but {config.data.source} has the "
            f"classes {', '.join(ours)}: give its labels those names, or the numbers from 0."
        )


def _data_names(config: Config) -> tuple[str, ...]:
    """The class names of a run's data, which is read."""
    sizes = {"batch_size": config.batch_size, "sequence_length": config.sequence_length}
    return data.load(config.data, **sizes, seed=config.seed).class_names


def _class_names(config: Config) -> tuple[tuple[str, ...], list[str]]:
    """The same, and what to tell where they cannot be known."""
    if config.data.task != "classify":
        return (), []
    try:
        with moved.explained(config):
            return _data_names(config), []
    except (OSError, ValueError) as error:
        return (), [f"classes are written as LABEL_0, LABEL_1, ...: {error}"]


def _kept(folder: Path, config: Config) -> Path:
    """What was kept of the source of a run, or of the imported run that it started from."""
    own, other = files.inside(folder, PRETRAINED), Path(config.data.tokenizer).expanduser()
    return other if other.name == PRETRAINED and not own.exists() else own


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.end < 0:  # nothing is known of its tokens
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    begin = tokenizer.end if tokenizer.begin is None else tokenizer.begin
    roles = {"bos": begin, "eos": tokenizer.end, "pad": tokenizer.pad}
    return {f"{role}_token_id": number for role, number in roles.items()}


def _has_tokenizer(kept: Path, tokenizer: Tokenizer) -> bool:
    """Whether a run's tokenizer is the one that it was imported with."""
    path = kept / "tokenizer.json"
    if not path.is_file():
        return False
    if tokenizer.name == "bytes":
        return for_transformers.is_bytes(read_json(inside(kept, path.name)))
    return tokenizers.load(str(path)).hash == tokenizer.hash


def _adopt(folder: Path, model: DecoderConfig | EncoderConfig, kept: Path) -> str:
    """Copies a folder's tokenizer to `kept`, and returns its name as of `DataConfig`."""
    older = _older(folder, model)
    if older is None:
        return "bytes"
    for_transformers.copy(folder, kept)
    library = need("tokenizers", "data", f"the tokenizer of {folder}")
    try:
        if older:
            _make(library, kept, *older)
        if for_transformers.is_bytes(read_json(kept / "tokenizer.json")):
            return "bytes"
        tokens = tokenizers.load(str(kept)).vocab_size
    except OSError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"the tokenizer of {folder} cannot be used: {error} Or choose one with --tokenizer."
        ) from error
    if tokens > model.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {tokens} tokens, more than the {model.vocab_size} of "
            "its model: take both from one source, or choose one with --tokenizer."
        )
    return str(kept.resolve())


def _older(folder: Path, model: DecoderConfig | EncoderConfig) -> tuple[str, ...] | None:
    """The files of a tokenizer that came before tokenizer.json; none where that is there.

    None if there is no tokenizer at all, and the model has a token for each byte.
    """
    has = {path.name for path in folder.iterdir()}
    if "tokenizer.json" in has:
        return ()
    simple = not has & {"added_tokens.json", "tokenizer.model"}
    if simple and isinstance(model, EncoderConfig) and "vocab.txt" in has:
        return ("vocab.txt",)
    if simple and _gpt2(model) and {"vocab.json", "merges.txt"} <= has:
        return "vocab.json", "merges.txt"
    if model.vocab_size == 256 and simple and not has & set(for_transformers.KEPT):
        return None
    raise ValueError(
        f"{folder} has no tokenizer that can be read: save it as a tokenizer.json, with "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers, or choose "
        "one with --tokenizer, such as bytes."
    )


def _make(library: Any, kept: Path, vocabulary: str, merges: str = "") -> None:
    """Writes the tokenizer.json of older files."""
    path = kept / "tokenizer_config.json"
    stated = read_json(path) if path.is_file() else {}
    if merges:
        made = for_transformers.byte_pairs(library, kept / vocabulary, kept / merges, stated)
    else:
        made = for_transformers.word_pieces(library, kept / vocabulary, stated)
    replace_text(kept / "tokenizer.json", made.to_str())


def _gpt2(model: DecoderConfig | EncoderConfig) -> bool:
    return isinstance(model, DecoderConfig) and model.positions == "learned"
