"""The command line: `python -m train [MODEL] [OPTIMIZER] [flags]`, or `resume RUN`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from models import PRESETS
from train import config, loop
from train.checkpoint import CheckpointError
from train.optimizers import OPTIMIZERS


def _optimizers() -> str:
    firsts = {name: str(kind.__doc__).partition("\n")[0] for name, kind in OPTIMIZERS.items()}
    return "\n".join(f"  {name:18}{first}" for name, first in firsts.items())


USAGE = f"""Train a language model on the embedded text (ten plays of Shakespeare, byte by byte).

usage: python -m train [MODEL] [OPTIMIZER] [flags]
       python -m train resume RUN [--steps N] [--step CHECKPOINT]

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
            tyro.cli(resume, args=args[1:], prog="python -m train resume")
        else:
            loop.train(parse(args))
    except BrokenPipeError:  # the reader has enough, such as `head`; there is nothing to flush to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"error: {error}. Choose a folder that can be written with --run.folder.")
    except (ValueError, FloatingPointError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports an interrupt; the run has said how to go on


def parse(args: Sequence[str]) -> config.Config:
    """The config that a command line names: positional names first, then flags.

    >>> parse(["tiny", "lion", "--steps", "300"]).name
    'tiny-lion'
    """
    names = []
    for arg in args[:2]:
        if arg.startswith("-"):
            break
        names.append(arg)
    default = config.preset(*names)
    if {"-h", "--help"} & set(args):
        print(USAGE)  # tyro would reflow it
    return tyro.cli(
        tyro.conf.AvoidSubcommands[config.Config],
        args=args[len(names) :],
        default=default,
        description="",
        prog=" ".join(["python -m train", *names]),
    )


def resume(
    run: Annotated[Path, tyro.conf.Positional],
    steps: int | None = None,
    step: int | None = None,
) -> None:
    """Go on with a run as if it had not stopped.

    Args:
      run: folder of the run, such as runs/tiny-sophia-g-20260101-120000.
      steps: train to this many steps instead; the learning rate follows the longer schedule.
      step: start from this checkpoint instead of the newest.
    """
    loop.resume(run, steps=steps, step=step)
