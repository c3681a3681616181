"""A run that was saved, or a model from elsewhere, as parameters to go on from."""

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
from train.checkpoint import classes, leaves, moved, policy, store
from train.config import command_line, serialize
from train.config.schema import Config
from train.data import Data, tokenizers

Model = models.DecoderConfig | models.EncoderConfig


class Saved(NamedTuple):
    """A run as it was at one of its checkpoints."""

    config: Config
    evaluate: Callable[..., dict[str, float]]
    step: int
    params: Any
    notes: tuple[str, ...]  # of checkpoints that could not be read
    data: Callable[[], Data]
    fingerprint: str  # of the data that it was trained on, as far as known


def load(folder: Path, step: int | None = None, data: moved.Places = moved.STAYED) -> Saved:
    """The parameters of a run, and these alone, sharded over the devices that are here.

    Args:
      folder: of the run.
      step: of a checkpoint; default the newest.
      data: where its data is now, if it has moved.

    Raises:
      ValueError: the folder holds no run.
      CheckpointError: no checkpoint can be read.
    """
    config = moved.placed(serialize.load(folder), data)
    programs = eval_program.build_eval(config)
    checkpoints = store.Checkpoints(folder / "checkpoints", save_interval=1)
    with checkpoints:
        done, state = checkpoints.restore(
            {"params": programs.params, "step": programs.step},
            step,
            wrong=policy.wrong_here,
            part=True,
        )
    fingerprint = checkpoints.record.get("fingerprint", "")
    notes, params = tuple(checkpoints.notes), state["params"]
    return Saved(config, programs.evaluate, done, params, notes, programs.data, fingerprint)


def start_from(path: Path, config: Config, fresh: Any, class_names: tuple[str, ...] = ()) -> Any:
    """Parameters of another run, or of a Hugging Face folder, in the place of fresh ones.

    Args:
      path: of a run, or of a folder with `config.json` and safetensors.
      config: what is to be trained. Layers may be stacked in one and not in the other, and the
        vocabulary padded to another multiple. An encoder's head that the model there lacks, or has
        for another task or other classes, stays fresh as a whole.
      fresh: parameters of `config`, on its mesh.
      class_names: of the data of `config`. The classes of what it starts from are put in their
        order, by name; other names are other classes.

    Raises:
      ValueError: other parameters than such a head's differ in name or shape, or the run there
        reads other tokens.
    """
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "does not exist"
        raise ValueError(
            f"--start-from {path} {what}: give the folder of a run, or one that transformers saved."
        )
    if _is_run(path):
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
    else:
        params = huggingface.load(path, vocab_multiple=config.model.vocab_multiple)[1]
        if class_names:
            params = _in_order(params, class_names, huggingface.read_notes(path).class_names)
    params = models.unstack_blocks(params)
    params = models.stack_blocks(params) if config.model.scan_layers else params
    if isinstance(config.model, models.EncoderConfig) and not _same(
        fresh["head"], params.get("head")
    ):
        params = {**params, "head": fresh["head"]}
    return _replace(path, fresh, params)


def _names_in(path: Path, there: Saved) -> tuple[str, ...]:
    """The class names of a run, which its data has."""
    try:
        return there.data().class_names
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the classes of {path} are named by its data, which cannot be read: {error} Put it "
            "back, or if it has moved, write a folder with export and --data.source, and start "
            "from that."
        ) from error


def _in_order(params: Any, ours: tuple[str, ...], theirs: tuple[str, ...]) -> Any:
    """A classifier with our numbers of its classes; without a head where they are other classes."""
    if not theirs or "out" not in params.get("head", {}):
        return params
    numbers = classes.order(ours, theirs)
    return {**params, "head": {}} if numbers is None else classes.permuted(params, numbers)


def _is_run(path: Path) -> bool:
    """By `config.json`, which a model of Hugging Face's has too."""
    return "optimizer" in read_json(path / "config.json")


def _check_tokenizer(path: Path, there: Config, config: Config) -> None:
    theirs, ours = there.data.tokenizer, config.data.tokenizer
    if theirs != ours and tokenizers.load(theirs).hash != tokenizers.load(ours).hash:
        raise ValueError(
            f"{path} was trained on tokens of {theirs}, which are not those of {ours}: set "
            f"--data.tokenizer {theirs}."
        )


def _padded(params: Any, there: Model, model: Model) -> Any:
    """Parameters with the padding rows of `model`, where the vocabulary is the same."""
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
        hint = " GPT-2's format has biases, and zeros for none: --model.bias." if biases else ""
        raise ValueError(
            f"{path} holds another model: {'; '.join(shown)} ({len(wrong)} such). Give the "
            f"flags --model.* that it was made with.{hint}"
        )

    def place(x, found):
        if isinstance(found, jax.Array):
            return jax.device_put(found.astype(x.dtype), x.sharding)
        found = np.asarray(found, x.dtype)
        return jax.make_array_from_callback(x.shape, x.sharding, found.__getitem__)

    return jax.tree.map(lambda x, found: x if x is found else place(x, found), fresh, params)
