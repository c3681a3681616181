"""Compares optimizers with equal budgets: `python -m benchmarks.leaderboard`.

This takes 27 runs or more, each of 20 to 40 seconds on two cores.

Nine optimizers train the tiny model. The learning rate of each is tuned by `rate_search`.
Everything else is fixed:

- the preset's hyperparameters, which were tuned at 1,200 steps or are guesses (see
  train/config/presets.py), with weight decay .1 on matrices;
- gradient clipping at 1, and 16 x 64 bytes per step;
- the preset's schedule, with its warm-up scaled to the length of the run.

The loss is the held-out loss of the whole held-out text after the last step, where the learning
rate has decayed.

Rates are chosen with seed 0. With --seeds N, the best rate is then trained with N seeds in all, and
the table shows means. Finished runs are kept in a file and are not trained again: an interrupted
sweep continues, and one with more optimizers or seeds reuses them. Delete the file after a change
of code.
"""

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rate_search import GRIDS, MOST_RATES, sweep
from train import program
from train.config import command_line
from train.config.presets import preset

PATH = Path("runs/leaderboard.json")


def show(rows: Mapping[str, dict[str, Any]], steps: int, console: Console) -> None:
    """The table, best first."""
    seeds = len(next(iter(rows.values()))["losses"])
    over = f"mean of seeds 0 to {seeds - 1} ± standard error" if seeds > 1 else "seed 0"
    table = Table(
        title=f"held-out loss of the tiny model after {steps} steps, {over}",
        caption="half, twice: nats at half and twice the rate, seed 0; state: bytes per parameter",
    )
    table.add_column("optimizer")
    for column in ("rate", "half", "nats", "twice", "bits/byte", "vs. adamw", "state", "ms/step"):
        table.add_column(column, justify="right")
    for name, row in ranked(rows):
        loss = statistics.mean(row["losses"])
        table.add_row(
            name,
            f"{row['rate']:g}",
            "none" if row["half"] is None else f"{row['half']:.3f}",
            f"[bold]{loss:.3f}[/bold]",
            "none" if row["twice"] is None else f"{row['twice']:.3f}",
            f"{loss / math.log(2):.3f}",
            difference(row["losses"], rows["adamw"]["losses"]) if "adamw" in rows else "",
            f"{row['state_bytes']:.1f}",
            f"{1e3 * row['seconds']:.1f}",
        )
    console.print(table)


def ranked(rows: Mapping[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(rows.items(), key=lambda item: statistics.mean(item[1]["losses"]))


def difference(losses: Sequence[float], others: Sequence[float]) -> str:
    """The mean difference, paired by seed: what a seed does to both runs cancels."""
    gaps = [a - b for a, b in zip(losses, others, strict=True)]
    mean = f"{statistics.mean(gaps):+.3f}"
    if len(gaps) < 2 or not all(map(math.isfinite, gaps)):
        return mean
    return f"{mean} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.3f}"


def advice(rows: Mapping[str, dict[str, Any]], path: Path, *, steps: int, seeds: int) -> str:
    """Notes on the table, and what to do next; the last line is a command."""
    lines = []
    for name, row in rows.items():
        own = preset("tiny", name).optim.learning_rate
        if None in (row["half"], row["twice"]):
            lines.append(f"{name}: no rate among {MOST_RATES} is better than both its neighbours.")
        elif not math.isclose(row["rate"], own):
            lines.append(f"{name}: best at {row['rate']:g}; its preset has {own:g}.")
    name, best = ranked(rows)[0]
    lines.append(f"To see samples and curves of {name}:\n{best['command']}")
    length = preset().steps
    if seeds < 3:
        lines.append(
            "Seeds differ by about .01 nats. To separate close optimizers, with standard errors:"
        )
        seeds = 3
    else:
        lines.append("To check the order in longer runs:")
        steps = length if steps < length else 2 * steps
    names = "" if set(rows) == set(GRIDS) else f" --optimizers {' '.join(rows)}"
    file = "" if path == PATH else f" --json {shlex.quote(str(path))}"
    script = f"{command_line.python()} -m benchmarks.leaderboard"
    lines.append(f"{script}{names} --steps {steps} --seeds {seeds}{file}")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.leaderboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=GRIDS,
        default=list(GRIDS),
        metavar="NAME",
        help=f"optimizers to compare, among {', '.join(GRIDS)} (all)",
    )
    parser.add_argument("--steps", type=int, default=400, help="training steps of a run (400)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds to train at the best rate (1)")
    parser.add_argument(
        "--json",
        type=Path,
        default=PATH,
        help=f"file of finished runs ({PATH})",
    )
    options = parser.parse_args(args)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds} must be at least 1.")
    program.use_compile_cache(preset().output.compile_cache)
    console = Console()
    budget = {"steps": options.steps, "seeds": options.seeds}
    try:
        rows = sweep(options.optimizers, options.json, console, **budget)
    except KeyboardInterrupt:
        sys.exit(f"stopped; finished runs are in {options.json}; the same command continues")
    except ValueError as error:
        sys.exit(f"error: {error}")
    show(rows, options.steps, Console(width=100))
    console.print(
        advice(rows, options.json, **budget), highlight=False, markup=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
