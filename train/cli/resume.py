"""The command `resume`, which goes on with a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from train import loop
from train.checkpoint import moved
from train.cli import flags
from train.config import serialize
from train.parallel import processes
from train.parallel.mesh import MeshConfig
from train.parallel.processes import DistributedConfig


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run as if it had not stopped."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, such as runs/tiny-sophia-g-20260101-120000."""
    steps: int | None = None
    """Train to this many steps instead; the learning rate follows the schedule of that length."""
    step: int | None = None
    """Start from this checkpoint instead of the newest, and delete the later ones."""
    warmup_steps: int | None = None
    """Warm up over this many steps instead."""
    allow_changes: bool = False
    """Go on although config or data differ from the checkpoint."""
    compile_cache: str | None = None
    """Folder of compiled programs; by default that of a new run."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How devices are arranged; by default as before."""
    data: moved.Places = moved.STAYED
    """Where the data is now, if it has moved."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def resume(args: Sequence[str]) -> None:
    """Goes on with a run."""
    words = parse(args)
    processes.start(words.distributed)
    loop.resume(
        words.run,
        steps=words.steps,
        step=words.step,
        warmup_steps=words.warmup_steps,
        mesh=words.mesh,
        data=words.data,
        allow_changes=words.allow_changes,
        compile_cache=words.compile_cache,
    )


def parse(args: Sequence[str]) -> Resume:
    """The command line of `resume`; the default mesh is that of the run.

    Raises:
      ValueError: the first word is not the folder of a run.
    """
    folder = Path(args[0]) if args and not args[0].startswith("-") else None
    mesh = serialize.load(folder).mesh if folder else MeshConfig()
    default = Resume(run=tyro.MISSING, mesh=mesh)
    flags.check(args, {"": default}, "python -m train resume")
    return tyro.cli(Resume, args=args, default=default, prog="python -m train resume")
