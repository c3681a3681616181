"""Makes a run from the model in a Hugging Face folder."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from models import PRESETS, DecoderConfig, EncoderConfig, huggingface
from models.config_json import write_class_names
from models.writing import replace_text
from train.checkpoint import classes, start
from train.config import presets
from train.config.schema import Config
from train.convert import tokenizer_files
from train.convert.class_names import class_names
from train.data import DataConfig
from train.data.config import PRETRAINED


def begin(folder: Path, run: Path, optimizer: str, tokenizer: str, source: DataConfig) -> None:
    """Makes a run, at step 0, of the model in a Hugging Face folder.

    Args:
      folder: of the model.
      run: the folder to make.
      optimizer: a name in `OPTIMIZERS`.
      tokenizer: as in `DataConfig`; empty takes that of the folder.
      source: the data. Its task and its tokenizer are not used: the model decides the task.

    Raises:
      ValueError: the folder, its tokenizer or the data cannot be used, or `run` is taken.
    """
    model, _ = huggingface.load(folder)
    notes = huggingface.read_notes(folder)
    with _keeping(run) as kept:
        name = tokenizer or tokenizer_files.adopt(folder, model, kept)
        beside = notes.ids
        made = _config(folder, run, model, optimizer, dataclasses.replace(source, tokenizer=name))
        if made.data.task == "classify":
            _check_classes(folder, made, notes.class_names)
            beside = beside | write_class_names(notes.class_names)
        replace_text(kept / "config.json", json.dumps(beside, indent=2) + "\n")
        start.begin(made)


@contextlib.contextmanager
def _keeping(run: Path) -> Iterator[Path]:
    """The new folder `PRETRAINED` of a run; it is removed again if an error is raised."""
    if (run / "config.json").exists() or (run / PRETRAINED).exists():
        raise ValueError(f"{run} already holds a run, or a part of one: choose another folder.")
    run.mkdir(parents=True, exist_ok=True)
    kept = run / PRETRAINED
    kept.mkdir()
    try:
        yield kept
    except BaseException:
        shutil.rmtree(kept)
        with contextlib.suppress(OSError):  # the folder holds something else
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
    ours = class_names(config)
    if theirs and classes.order(ours, theirs) is None:
        raise ValueError(
            f"{folder} is a classifier of {', '.join(theirs)}, but {config.data.source} has the "
            f"classes {', '.join(ours)}: give its labels those names, or the numbers from 0."
        )
