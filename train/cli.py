"""The command line: `python -m train [MODEL] [OPTIMIZER] [flags]`, or `resume RUN`."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from models import PRESETS
from train import config, distributed, loop, signals
from train.checkpoint import CheckpointError
from train.distributed import DistributedConfig
from train.mesh import MeshConfig
from train.optimizers import OPTIMIZERS


def _optimizers() -> str:
    firsts = {name: str(kind.__doc__).partition("\n")[0] for name, kind in OPTIMIZERS.items()}
    return "\n".join(f"  {name:18}{first}" for name, first in firsts.items())


USAGE = f"""Train a language model on the embedded text (ten plays of Shakespeare, byte by byte).

usage: python -m train [MODEL] [OPTIMIZER] [flags]
       python -m train resume RUN [--steps N] [--step CHECKPOINT] [--mesh.fsdp N]

MODEL
  {", ".join(PRESETS)}

OPTIMIZER
{_optimizers()}

python -m train                          the tiny model with Sophia-G, in under two minutes
python -m train tiny adamw --steps 500   another optimizer, a shorter run
python -m train tiny sophia-g --optim.gamma .05 --mesh.fsdp 4

The flags, with their defaults for the model and optimizer named, follow.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command; a mistake of the user's ends it with one line that names the cure."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        if args and args[0] == "resume":
            again = parse_resume(args[1:])
            distributed.start(again.distributed)
            loop.resume(
                again.run,
                steps=again.steps,
                step=again.step,
                mesh=again.mesh,
                allow_changes=again.allow_changes,
                compile_cache=again.compile_cache,
            )
        else:
            run, processes = parse_all(args)
            distributed.start(processes)
            loop.train(run)
    except BrokenPipeError:  # the reader has enough, such as `head`; there is nothing to flush to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ConnectionError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}. Choose a folder that can be written with --run.folder.")
    except (ValueError, FloatingPointError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except signals.Stopped:
        pass  # as it was told to: the run has said how to go on
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports an interrupt


@dataclasses.dataclass(frozen=True)
class _Words:
    """What a command line of a new run holds."""

    config: Annotated[config.Config, tyro.conf.arg(name="")]
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def parse(args: Sequence[str]) -> config.Config:
    """The config that a command line names: positional names first, then flags.

    >>> parse(["tiny", "lion", "--steps", "300"]).name
    'tiny-lion'
    """
    return parse_all(args)[0]


def parse_all(args: Sequence[str]) -> tuple[config.Config, DistributedConfig]:
    """The config, and the processes that share the work."""
    names = []
    for arg in args[:2]:
        if arg.startswith("-"):
            break
        names.append(arg)
    default = config.preset(*names)
    if {"-h", "--help"} & set(args):
        print(USAGE)  # tyro would reflow it
    words = tyro.cli(
        tyro.conf.AvoidSubcommands[_Words],
        args=args[len(names) :],
        default=_Words(default),
        description="",
        prog=" ".join(["python -m train", *names]),
    )
    return words.config, words.distributed


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run as if it had not stopped."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, such as runs/tiny-sophia-g-20260101-120000."""
    steps: int | None = None
    """Train to this many steps instead; the learning rate follows the longer schedule."""
    step: int | None = None
    """Start from this checkpoint instead of the newest."""
    allow_changes: bool = False
    """Go on although config or data are not those of the checkpoint."""
    compile_cache: str | None = None
    """Folder of compiled programs; by default that of a new run."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How devices are arranged; by default as before."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def parse_resume(args: Sequence[str]) -> Resume:
    """What `resume` is told; the default mesh is that of the run.

    Raises:
      ValueError: the first word names no run.
    """
    folder = Path(args[0]) if args and not args[0].startswith("-") else None
    mesh = config.load(folder).mesh if folder else MeshConfig()
    default = Resume(run=tyro.MISSING, mesh=mesh)
    return tyro.cli(Resume, args=args, default=default, prog="python -m train resume")
