"""The command line of a new run: `python -m train [MODEL] [OPTIMIZER] [flags]`."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from train.cli import flags
from train.config import command_line, presets, schema
from train.optimizers.base import OptimizerConfig
from train.parallel.processes import DistributedConfig


def parse(args: Sequence[str], prog: str = "python -m train") -> schema.Config:
    """The config that a command line names: positional names first, then flags.

    >>> parse(["tiny", "lion", "--steps", "300"]).name
    'tiny-lion'
    """
    return parse_all(args, prog)[0]


def parse_all(
    args: Sequence[str], prog: str = "python -m train", usage: str = ""
) -> tuple[schema.Config, DistributedConfig]:
    """The config, and how several processes share the work.

    Args:
      args: words of the command line.
      prog: name of the program in messages.
      usage: printed before the flags where `--help` is asked for.

    Raises:
      ValueError: a name or flag is unknown, or the config makes no sense.
    """
    args = flags.current(args)
    names = _leading_names(args)
    words, default = args[len(names) :], presets.preset(*names)
    prog = " ".join([prog, *names])
    if usage and {"-h", "--help"} & set(args):
        print(usage)  # tyro would reflow it
    flags.check(words, {"": default, "distributed.": DistributedConfig()}, prog)
    parsed = tyro.cli(
        tyro.conf.AvoidSubcommands[_Words],
        args=words,
        default=_Words(_Draft(**_fields(default))),
        description="",
        prog=prog,
    )
    optim, note = _fitted(parsed.config, words)
    if note:
        print(note, file=sys.stderr)
    fields: dict[str, Any] = _fields(parsed.config) | {"optim": optim}
    config = schema.Config(**fields)
    return config, parsed.distributed


@dataclasses.dataclass(frozen=True)
class _Draft(schema.Config):
    """A config as the words give it, checked once the sample of curvature fits the batch."""

    def __post_init__(self):
        pass


@dataclasses.dataclass(frozen=True)
class _Words:
    """What a command line of a new run holds."""

    config: Annotated[_Draft, tyro.conf.arg(name="")]
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def _leading_names(args: Sequence[str]) -> list[str]:
    """The words before the first flag, two at most: MODEL and OPTIMIZER."""
    first_flag = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    return list(args[: min(first_flag, 2)])


def _fields(config: schema.Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _fitted(config: schema.Config, words: Sequence[str]) -> tuple[OptimizerConfig, str]:
    """The optimizer with hyperparameters that suit the batch, but for those that a word names.

    Returns:
      (the optimizer, a note for the user; empty if nothing was changed).
    """
    rows, pieces = config.batch_size, config.accumulation
    flags_given = [word.partition("=")[0].replace("-", "_") for word in words]
    fixed = {flag.partition("__optim.")[2] for flag in flags_given}
    if min(rows, pieces) < 1 or rows % pieces:  # the config itself refuses these numbers
        return config.optim, ""
    fit = config.optim.fitted(rows, pieces, fixed)
    changed = command_line.differing(fit, config.optim)
    said = " ".join(f"--optim.{name.replace('_', '-')} {_short(new)}" for name, new in changed)
    cut = f" in {pieces} micro-batches" * (pieces > 1)
    return fit, f"{said}: the preset's share, fitted to a batch of {rows}{cut}." if said else ""


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
