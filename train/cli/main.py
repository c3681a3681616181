"""The command line: `python -m train [MODEL] [OPTIMIZER] [flags]`, or a command and its flags."""

import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tyro

from models import PRESETS
from train import files
from train.checkpoint.errors import CheckpointError
from train.cli.train import parse_all
from train.optimizers.registry import OPTIMIZERS
from train.parallel import processes, signals


class Command(NamedTuple):
    """Where a command is; its module is imported when it is called."""

    module: str
    function: str
    help: str
    parses: bool = False  # its defaults depend on its first words, so it parses them itself


_TOKENIZER_HELP = "a vocabulary from a text"
COMMANDS = {
    "resume": Command(
        "train.cli.resume", "resume", "go on with a run as if it had not stopped", True
    ),
    "eval": Command("train.cli.inspect", "evaluate", "loss of a run on the held-out data"),
    "sample": Command("train.cli.inspect", "sample", "text from a run"),
    "plan": Command(
        "train.cli.plan", "command", "memory, FLOPs and collectives of a run, without it", True
    ),
    "import": Command("train.cli.convert", "import_", "a run from a Hugging Face folder"),
    "export": Command("train.cli.convert", "export", "a Hugging Face folder from a run"),
    "prepare": Command("train.data.prepare.prepare", "prepare", "a text as tokens in binary files"),
    "train-tokenizer": Command("train.data.prepare.prepare", "train_tokenizer", _TOKENIZER_HELP),
}


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

COMMAND, each with its own --help
{_lines({name: command.help for name, command in COMMANDS.items()})}

python -m train                          the tiny model with Sophia-G, in under two minutes
python -m train tiny adamw --steps 500   another optimizer, a shorter run
python -m train tiny sophia-g --optim.gamma .05 --mesh.fsdp 4

The flags follow, with their defaults for this model and optimizer.
"""


def _lines(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:18}{text}" for name, text in rows.items())


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake ends it with one line that names the cure."""
    with processes.leaving():
        _main(list(sys.argv[1:] if args is None else args))


def _main(args: list[str]) -> None:
    try:
        _run(args)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe: nothing to flush to
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
        pass  # the run has printed how to go on
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports an interrupt


def _run(args: list[str]) -> None:
    name = args[0] if args else ""
    if name not in COMMANDS:
        config, distributed = parse_all(args, usage=usage())
        processes.start(distributed)
        _attribute("train.loop", "train")(config)
        return
    command = COMMANDS[name]
    function = _attribute(command.module, command.function)
    if command.parses:
        function(args[1:])
    else:
        for word in args[1:2] if name == "sample" else args[1:]:  # a prompt may be an address
            files.check_local(word.partition("=")[2] if word[:2] == "--" else word, "the path")
        tyro.cli(function, args=args[1:], prog=f"python -m train {name}")


def _attribute(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)
