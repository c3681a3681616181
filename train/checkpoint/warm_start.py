"""Parameters to start from: those of another run, or of a Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import models
from models import huggingface
from models.reading import read_json
from train import eval_program
from train.checkpoint import classes, leaves, moved, store, validate
from train.config import command_line, serialize
from train.config.schema import Config
from train.data import Data, tokenizers

Model = models.DecoderConfig | models.EncoderConfig


class LoadedRun(NamedTuple):
    """A run as it was at one of its checkpoints, without its optimizer."""

    config: Config
    evaluate: Callable[..., dict[str, float]]
    step: int
    params: Any
    notes: tuple[str, ...]  # about checkpoints that could not be read
    data: Callable[[], Data]
    fingerprint: str  # of the data that it was trained on; empty if unknown


def load(folder: Path, step: int | None = None, data: moved.Places = moved.STAYED) -> LoadedRun:
    """Loads the parameters of a run alone, sharded over the devices of this machine.

    Args:
      folder: of the run.
      step: of a checkpoint; default the newest that can be read.
      data: where its data is now, if it has moved.

    Raises:
      ValueError: the folder holds no run.
      CheckpointError: no checkpoint can be read.
    """
    config = moved.placed(serialize.load(folder), data)
    programs = eval_program.build_eval(config)
    with store.Checkpoints(folder / "checkpoints") as checkpoints:
        done, state = checkpoints.restore(
            {"params": programs.params, "step": programs.step},
            step,
            wrong=validate.problem,
            part=True,
        )
    fingerprint = checkpoints.manifest.get("fingerprint", "")
    notes, params = tuple(checkpoints.notes), state["params"]
    return LoadedRun(config, programs.evaluate, done, params, notes, programs.data, fingerprint)


def start_from(path: Path, config: Config, fresh: Any, class_names: tuple[str, ...] = ()) -> Any:
    """Parameters of another run, or of a Hugging Face folder, in place of fresh ones.

    Layers may be stacked in one model and not in the other, and the vocabulary padded to another
    multiple. An encoder's head stays fresh as a whole if the other model lacks it, or has it for
    another task or other classes.

    Args:
      path: of a run, or of a folder with `config.json` and safetensors.
      config: what is to be trained.
      fresh: parameters of `config`, on its mesh.
      class_names: of the data of `config`. Classes are matched by name and reordered.

    Raises:
      ValueError: parameters outside the head differ in name or shape, or the other run reads other
        tokens.
    """
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "does not exist"
        raise ValueError(
            f"--start-from {path} {what}: give the folder of a run, or one that transformers saved."
        )
    read = _from_run if _is_run(path) else _from_hugging_face
    params = models.unstack_blocks(read(path, config, class_names))
    params = models.stack_blocks(params) if config.model.scan_layers else params
    if isinstance(config.model, models.EncoderConfig) and not _same(
        fresh["head"], params.get("head")
    ):
        params = {**params, "head": fresh["head"]}
    return _replace(path, fresh, params)


def _from_run(path: Path, config: Config, class_names: tuple[str, ...]) -> Any:
    if not (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} has no checkpoint yet: resume it first with "
            f"{command_line.call('resume', path)}, or start from another."
        )
    there = load(path)
    _check_tokenizer(path, there.config, config)
    params = _padded(there.params, there.config.model, config.model)
    if class_names and there.config.data.task == "classify":
        params = _in_order(params, class_names, _names_in(path, there))
    return params


def _from_hugging_face(path: Path, config: Config, class_names: tuple[str, ...]) -> Any:
    params = huggingface.load(path, vocab_multiple=config.model.vocab_multiple)[1]
    if class_names:
        params = _in_order(params, class_names, huggingface.read_notes(path).class_names)
    return params


def _names_in(path: Path, there: LoadedRun) -> tuple[str, ...]:
    """The class names of a run; only its data holds them."""
    try:
        return there.data().class_names
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the classes of {path} are named by its data, which cannot be read: {error} Put it "
            "back, or if it has moved, write a folder with export and --data.source, and start "
            "from that."
        ) from error


def _in_order(params: Any, ours: tuple[str, ...], theirs: tuple[str, ...]) -> Any:
    """A classifier with its classes in our order; without its head if they are other classes."""
    if not theirs or "out" not in params.get("head", {}):
        return params
    numbers = classes.order(ours, theirs)
    return {**params, "head": {}} if numbers is None else classes.permuted(params, numbers)


def _is_run(path: Path) -> bool:
    """Whether `config.json` is a run's; a Hugging Face folder has a file of that name too."""
    return "optimizer" in read_json(path / "config.json")


def _check_tokenizer(path: Path, there: Config, config: Config) -> None:
    theirs, ours = there.data.tokenizer, config.data.tokenizer
    if theirs != ours and tokenizers.load(theirs).hash != tokenizers.load(ours).hash:
        raise ValueError(
            f"{path} was trained on tokens of {theirs}, which are not those of {ours}: set "
            f"--data.tokenizer {theirs}."
        )


def _padded(params: Any, there: Model, model: Model) -> Any:
    """Parameters with the padding rows of `model`, if the vocabulary is the same."""
    if there.vocab_size != model.vocab_size:
        return params
    rows = model.padded_vocab - model.vocab_size

    def pad(place, x):
        name = leaves.name_of(place)
        if name not in huggingface.VOCABULARY or len(x) != there.padded_vocab:
            return x
        return jnp.pad(x[: model.vocab_size], [(0, rows), (0, 0)][: x.ndim])

    return jax.tree.map_with_path(pad, params)


def _named(params: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(place): x for place, x in jax.tree.leaves_with_path(params)}


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in _named(params).items()}


def _same(params: Any, others: Any) -> bool:
    return _shapes(params) == _shapes(others)


def _replace(path: Path, fresh: Any, params: Any) -> Any:
    have, want = _shapes(params), _shapes(fresh)
    wrong = [name for name in want | have if want.get(name) != have.get(name)]
    if wrong:
        shown = (f"{name} is {have.get(name)}, not {want.get(name)}" for name in wrong[:3])
        biases = all("bias" in name and name not in want for name in wrong)
        hint = " GPT-2's format has biases, zeros if unused: add --model.bias." if biases else ""
        raise ValueError(
            f"{path} holds another model: {'; '.join(shown)} ({len(wrong)} in all). Give the "
            f"flags --model.* that it was made with.{hint}"
        )
    return jax.tree.map(lambda x, found: x if x is found else _placed(x, found), fresh, params)


def _placed(like: jax.Array, found: Any) -> jax.Array:
    """The array on the devices of `like`, and of its dtype."""
    if isinstance(found, jax.Array):
        return jax.device_put(found.astype(like.dtype), like.sharding)
    found = np.asarray(found, like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, found.__getitem__)
