"""Names of flags: which exist, which are old, and which one a misspelt flag meant."""

import dataclasses
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Spellings of other trainers -> the last word of ours.
_USUAL = {
    "lr": "learning-rate",
    "max-lr": "learning-rate",
    "peak-lr": "learning-rate",
    "min-lr": "final-learning-rate",
    "wd": "weight-decay",
    "beta1": "b1",
    "beta-1": "b1",
    "adam-beta1": "b1",
    "momentum": "b1",
    "beta2": "b2",
    "beta-2": "b2",
    "adam-beta2": "b2",
    "epsilon": "eps",
    "rho": "gamma",
    "bs": "batch-size",
    "batch": "batch-size",
    "train-batch-size": "batch-size",
    "seq-len": "sequence-length",
    "seq-length": "sequence-length",
    "max-seq-len": "sequence-length",
    "block-size": "sequence-length",
    "context-length": "sequence-length",
    "max-steps": "steps",
    "num-steps": "steps",
    "total-steps": "steps",
    "train-steps": "steps",
    "iters": "steps",
    "max-iters": "steps",
    "warmup": "warmup-steps",
    "warmup-iters": "warmup-steps",
    "grad-clip": "gradient-clip",
    "clip": "gradient-clip",
    "max-grad-norm": "gradient-clip",
    "grad-accum": "accumulation",
    "gradient-accumulation": "accumulation",
    "gradient-accumulation-steps": "accumulation",
    "dtype": "precision",
    "bf16": "precision",
    "eval-every": "evaluate-every",
    "eval-interval": "evaluate-every",
    "eval-steps": "evaluate-every",
    "eval-iters": "evaluate-tokens",
    "save-every": "checkpoint-every",
    "save-interval": "checkpoint-every",
    "save-steps": "checkpoint-every",
    "log-interval": "log-every",
    "out": "folder",
    "out-dir": "folder",
    "output": "folder",
    "output-dir": "folder",
    "dataset": "source",
    "data-path": "source",
    "init-from": "start-from",
    "resume-from": "start-from",
    "n-layer": "layers",
    "num-layers": "layers",
    "n-head": "heads",
    "num-heads": "heads",
    "n-embd": "width",
    "d-model": "width",
    "hidden-size": "width",
    "vocab": "vocab-size",
    "random-seed": "seed",
}


OLD = {
    "--run.": "--output.",
    "--optim.spread": "--optim.amortize",
    "--optim.no-spread": "--optim.no-amortize",
    "--optim.no_spread": "--optim.no_amortize",
    "--optim.b2-numbers": "--optim.b2-vector",
    "--optim.b2_numbers": "--optim.b2_vector",
}
"""Beginnings of flags that have another name now."""


def current(args: Sequence[str]) -> list[str]:
    """The words with flags under their names of today; each change is printed.

    >>> current(["--run.quiet", "--steps", "9"])
    ['--output.quiet', '--steps', '9']
    """
    return [_current(word) for word in args]


def _current(word: str) -> str:
    for old, new in OLD.items():
        if word.startswith(old):
            flag = word.partition("=")[0]
            print(f"{flag} is now {flag.replace(old, new)}", file=sys.stderr)
            return word.replace(old, new, 1)
    return word


def check(args: Sequence[str], defaults: Mapping[str, Any], program: str) -> None:
    """Raises ValueError for an unknown flag, and names the flag that was meant.

    Args:
      args: words of a command line.
      defaults: prefix -> the dataclass of its flags.
      program: the command that lists them with `--help`.

    >>> from train.config.presets import preset
    >>> check(["--optim.lr", "3"], {"": preset()}, "python -m train")
    Traceback (most recent call last):
    ...
    ValueError: unknown flag --optim.lr. Did you mean --optim.learning-rate? All are listed by \
python -m train --help.
    """
    known = [flag for prefix, default in defaults.items() for flag in names(default, prefix)]
    for arg in args:
        flag = arg.partition("=")[0].replace("_", "-")
        if not flag.startswith("--") or flag in ("--", "--help") or flag.startswith("--tyro-"):
            continue
        if flag[2:] not in known:
            near = _nearest(flag[2:], known)
            hint = f" Did you mean --{near}?" if near else ""
            raise ValueError(
                f"unknown flag {arg.partition('=')[0]}.{hint} All are listed by {program} --help."
            )


def _nearest(flag: str, known: Sequence[str]) -> str:
    """The flag with the same meaning, else the most similar spelling; empty if none is near."""
    room, _, name = flag.rpartition(".")
    last = _USUAL.get(name, name)
    same = [word for word in known if word.rpartition(".")[2] == last]
    same.sort(key=lambda word: word.rpartition(".")[0] != room)
    forms = {word.rpartition(".")[2]: word for word in reversed(known)}
    close = [forms[form] for form in difflib.get_close_matches(name, forms, 1, cutoff=0.5)]
    return [*same, *difflib.get_close_matches(flag, known, 1, cutoff=0.8), *close, ""][0]


def names(default: Any, prefix: str = "") -> Iterator[str]:
    """The flags of a dataclass, without the leading dashes."""
    for field in dataclasses.fields(default):
        value, name = getattr(default, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from names(value, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}"
        if isinstance(value, bool):
            yield f"{prefix}no-{name}"
