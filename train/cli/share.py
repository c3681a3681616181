"""The share of rows that curvature is sampled of, fitted to the batch that a command line names."""

import argparse
import dataclasses
from collections.abc import Sequence

from train.config.schema import Config
from train.optimizers.sophia import SophiaG, SophiaH


def fitted(config: Config, args: Sequence[str]) -> tuple[Config, str]:
    """A preset whose share of rows suits the batch that a command line names.

    Args:
      config: the preset.
      args: the words of the command line. A share that they name is left as it is.

    Returns:
      (the preset with that batch, what to say of it: empty if the share is as it was)
    """
    if not isinstance(config.optim, SophiaG | SophiaH):
        return config, ""
    known = _cutting(config, args)
    rows, pieces, optim = known.batch_size, known.accumulation, _as_told(config.optim, known)
    if known.batch_fraction is not None or min(rows, pieces, optim.update_interval) < 1:
        return config, ""
    fit = optim.fitted(rows, pieces, regroup=known.groups is None)
    if fit == optim or rows % pieces:
        return config, ""
    said = f"--optim.batch-fraction {fit.batch_fraction:.4g}"
    if fit.groups != optim.groups:
        said += f" --optim.groups {fit.groups}"
    cut = f" in {pieces} micro-batches" * (pieces > 1)
    config = dataclasses.replace(config, batch_size=rows, accumulation=pieces, optim=fit)
    return config, f"{said}: the preset's share, fitted to a batch of {rows}{cut}."


def _cutting(config: Config, args: Sequence[str]) -> argparse.Namespace:
    """What the words say of how the batch is cut."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in (("batch-size", config.batch_size), ("accumulation", config.accumulation)):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", type=int, default=default)
    for name, kind in (("batch-fraction", str), ("groups", int), ("update-interval", int)):
        flags = f"--optim.{name}", f"--optim.{name.replace('-', '_')}"
        parser.add_argument(*flags, type=kind, dest=name.replace("-", "_"))
    parser.add_argument("--optim.amortize", action="store_true", dest="amortize")
    try:
        return parser.parse_known_args(args)[0]
    except argparse.ArgumentError:  # the command line itself will name the mistake
        return parser.parse_known_args([])[0]


def _as_told(optim: SophiaG | SophiaH, known: argparse.Namespace) -> SophiaG | SophiaH:
    told = {name: getattr(known, name) for name in ("groups", "update_interval")}
    told = {name: value for name, value in told.items() if value is not None}
    return dataclasses.replace(optim, amortize=optim.amortize or known.amortize, **told)
