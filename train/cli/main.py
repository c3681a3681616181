"""The command line: `python -m train [MODEL] [OPTIMIZER] [flags]`, or a command and its own."""

import dataclasses
import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from models import PRESETS
from train import files
from train.checkpoint.store import CheckpointError
from train.cli import flags, share
from train.config import presets, schema
from train.optimizers.registry import OPTIMIZERS
from train.parallel import processes as distributed
from train.parallel import signals
from train.parallel.processes import DistributedConfig

COMMANDS = {
    "resume": ("train.cli.inspect", "resume", "go on with a run as if it had not stopped"),
    "eval": ("train.cli.inspect", "evaluate", "a run's loss on the held-out data"),
    "sample": ("train.cli.inspect", "sample", "text from a run"),
    "plan": ("train.plan.report", "command", "memory, operations and traffic of a run, without it"),
    "import": ("train.cli.inspect", "import_", "a run from a Hugging Face folder"),
    "export": ("train.cli.inspect", "export", "a Hugging Face folder from a run"),
    "prepare": ("train.data.prepare.prepare", "prepare", "a text as tokens in binary files"),
    "train-tokenizer": (
        "train.data.prepare.train_tokenizer",
        "train_tokenizer",
        "a vocabulary from a text",
    ),
}
"""Name -> (module, function, what it makes); modules are imported when asked for."""

PARSES_ITSELF = ("resume", "plan")
"""Commands whose defaults depend on their first words."""


def _lines(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:18}{text}" for name, text in rows.items())


def usage() -> str:
    """What `--help` opens with."""
    models = textwrap.fill(", ".join(PRESETS), 96, break_on_hyphens=False)
    models = textwrap.indent(models, "  ")
    firsts = {name: str(kind.__doc__).partition("\n")[0] for name, kind in OPTIMIZERS.items()}
    return f"""Train a language model, by default on the embedded text (ten plays of Shakespeare).

usage: python -m train [MODEL] [OPTIMIZER] [flags]
       python -m train COMMAND ...

MODEL
{models}

OPTIMIZER
{_lines(firsts)}

COMMAND, each with a --help of its own
{_lines({name: text for name, (_, _, text) in COMMANDS.items()})}

python -m train                          the tiny model with Sophia-G, in under two minutes
python -m train tiny adamw --steps 500   another optimizer, a shorter run
python -m train tiny sophia-g --optim.gamma .05 --mesh.fsdp 4

The flags, with their defaults for the model and optimizer named, follow.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command; a mistake of the user's ends it with one line that names the cure."""
    with distributed.leaving():
        _main(list(sys.argv[1:] if args is None else args))


def _main(args: list[str]) -> None:
    try:
        _run(args)
    except BrokenPipeError:  # the reader has enough, such as `head`; there is nothing to flush to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ConnectionError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        new = not args or args[0] not in COMMANDS
        cure = ". Choose a folder that can be written with --output.folder." if new else ""
        sys.exit(f"error: {error}{cure}")
    except (ValueError, FloatingPointError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except signals.Stopped:
        pass  # as it was told to: the run has said how to go on
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports an interrupt


def _run(args: list[str]) -> None:
    name = args[0] if args else ""
    if name in PARSES_ITSELF:
        _command(name)(args[1:])
    elif name in COMMANDS:
        for word in args[1:2] if name == "sample" else args[1:]:  # a prompt may be an address
            files.check_local(word.partition("=")[2] if word[:2] == "--" else word, "the path")
        tyro.cli(_command(name), args=args[1:], prog=f"python -m train {name}")
    else:
        from train import loop  # the heavier half

        config, processes = parse_all(args)
        distributed.start(processes)
        loop.train(config)


def _command(name: str) -> Callable[..., Any]:
    module, function, _ = COMMANDS[name]
    return getattr(importlib.import_module(module), function)


@dataclasses.dataclass(frozen=True)
class _Words:
    """What a command line of a new run holds."""

    config: Annotated[schema.Config, tyro.conf.arg(name="")]
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def parse(args: Sequence[str], prog: str = "python -m train") -> schema.Config:
    """The config that a command line names: positional names first, then flags.

    >>> parse(["tiny", "lion", "--steps", "300"]).name
    'tiny-lion'
    """
    return parse_all(args, prog)[0]


def parse_all(
    args: Sequence[str], prog: str = "python -m train"
) -> tuple[schema.Config, DistributedConfig]:
    """The config, and the processes that share the work."""
    args, names = flags.current(args), []
    for arg in args[:2]:
        if arg.startswith("-"):
            break
        names.append(arg)
    default, note = share.fitted(presets.preset(*names), args)
    if note:
        print(note, file=sys.stderr)
    if {"-h", "--help"} & set(args):
        print(usage())  # tyro would reflow it
    prog = " ".join([prog, *names])
    flags.check(args[len(names) :], {"": default, "distributed.": DistributedConfig()}, prog)
    words = tyro.cli(
        tyro.conf.AvoidSubcommands[_Words],
        args=args[len(names) :],
        default=_Words(default),
        description="",
        prog=prog,
    )
    return words.config, words.distributed
