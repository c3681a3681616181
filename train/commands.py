"""Commands on runs that were saved, each a function that `tyro` makes flags of."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from models import huggingface
from train import saved
from train.mesh import MeshConfig

Folder = Annotated[Path, tyro.conf.Positional]


def evaluate(run: Folder, step: int | None = None, mesh: MeshConfig | None = None) -> None:
    """Loss of a run on the whole held-out data.

    Args:
      run: folder of the run.
      step: of a checkpoint; default the newest.
      mesh: how to arrange the devices; by default rows over all of them.
    """
    loaded = saved.load(run, step, mesh=mesh)
    figures = loaded.programs.evaluate(loaded.params)
    console = Console()
    for name, value in figures.items():
        console.print(f"{name.replace('_', ' ')}: {value:.4f}", highlight=False)
    console.print(f"{run} at step {loaded.step}", highlight=False, soft_wrap=True)


def export(run: Folder, output: Folder, step: int | None = None) -> None:
    """Write a run's model as a Hugging Face folder: `config.json` and `model.safetensors`.

    Args:
      run: folder of the run.
      output: the folder to write; a model in it is replaced.
      step: of a checkpoint; default the newest.
    """
    loaded = saved.load(run, step)
    huggingface.save(loaded.params, loaded.run.model, output)
    Console().print(
        f"{output} holds {run} at step {loaded.step}; read it with "
        f"transformers.AutoModel.from_pretrained({str(output)!r})",
        highlight=False,
        soft_wrap=True,
    )
