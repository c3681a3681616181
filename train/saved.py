"""A run that was saved, or a model from elsewhere, as parameters to go on from."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import models
from models import huggingface
from train import checkpoint, config, program
from train.config import Config
from train.mesh import MeshConfig


class Saved(NamedTuple):
    """A run as it was at one of its checkpoints."""

    run: Config
    programs: program.Program
    step: int
    params: Any


def load(folder: Path, step: int | None = None, *, mesh: MeshConfig | None = None) -> Saved:
    """The parameters of a run on the devices that are here, whatever it was trained on.

    Args:
      folder: of the run.
      step: of a checkpoint; default the newest.
      mesh: how to arrange the devices; by default rows over all of them, parameters over none.

    Raises:
      ValueError: the folder holds no run, or the mesh does not fit.
      CheckpointError: no checkpoint can be read.
    """
    run = dataclasses.replace(config.load(folder), mesh=mesh or MeshConfig())
    programs = program.assemble(run, None if mesh or _fits(run) else jax.devices()[:1])
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", save_interval=1)
    with checkpoints:
        done, state = checkpoints.restore(programs.abstract, step)
    return Saved(run, programs, done, state.params)


def _fits(run: Config) -> bool:
    return run.batch_size % (jax.device_count() * run.accumulation) == 0


def start_from(path: Path, run: Config, fresh: Any) -> Any:
    """Parameters of another run, or of a Hugging Face folder, in the place of fresh ones.

    Args:
      path: of a run, or of a folder with `config.json` and safetensors.
      run: what is to be trained. Layers may be stacked in one and not in the other. A head that
        the model there lacks, or has for other classes, stays fresh.
      fresh: parameters of `run`, on its mesh.

    Raises:
      ValueError: other parameters than the head's differ in name or shape.
    """
    if (path / "checkpoints").is_dir():
        params = jax.device_get(load(path).params)
    else:
        params = huggingface.load(path)[1]
    params = models.unstack_blocks(params)
    params = models.stack_blocks(params) if run.model.scan_layers else params
    return _replace(path, fresh, params)


def _replace(path: Path, fresh: Any, params: Any) -> Any:
    have = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(params)}
    wrong = []

    def leaf(place, x):
        name = jax.tree_util.keystr(place)
        found = have.get(name)
        if found is not None and found.shape == x.shape:
            found = np.asarray(found, x.dtype)
            return jax.make_array_from_callback(x.shape, x.sharding, found.__getitem__)
        if not name.startswith("['head']"):
            wrong.append(f"{name} is {None if found is None else found.shape}, not {x.shape}")
        return x

    placed = jax.tree_util.tree_map_with_path(leaf, fresh)
    if wrong:
        raise ValueError(
            f"{path} holds another model: {'; '.join(wrong[:3])} ({len(wrong)} such). Give the "
            "flags --model.* that it was made with."
        )
    return placed
