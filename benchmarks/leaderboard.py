"""Who trains best on one budget: `python -m benchmarks.leaderboard`.

Twenty-seven runs or more, of 20 to 40 seconds each on two cores.

Nine optimizers train the tiny model. The learning rate is tuned alike for all: at three rates a
factor of 2 apart, then at further ones, until the best has a worse neighbour on both sides. All
else is fixed: the preset's hyperparameters, which were tuned at 1,200 steps or are guesses (see
train/presets.py); weight decay .1 on matrices, gradient clip 1, 16 x 64 bytes a step; the preset's
schedule, with its warm-up scaled to the run. The loss is that of the whole held-out text at the
last step, where the rate has decayed.

Rates are chosen at seed 0; with --seeds N the best one is then trained at N seeds in all, and the
table has means. Finished runs are kept in a file and not trained again: an interrupted sweep
goes on, and one of more optimizers or seeds reuses them. Delete the file after a change of code.
"""

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from train import program
from train.config import command_line
from train.config.presets import preset
from train.config.schema import Config

PATH = Path("runs/leaderboard.json")
WEIGHT_DECAY = 0.1
GRIDS = {
    "sophia-g": (7.5e-4, 1.5e-3, 3e-3),
    "sophia-h": (1.5e-3, 3e-3, 6e-3),
    "sophia-lite": (1.25e-3, 2.5e-3, 5e-3),
    "sophia-geometric": (1e-3, 2e-3, 4e-3),
    "orthosoph": (2e-2, 4e-2, 8e-2),
    "soaa": (2.5e-3, 5e-3, 1e-2),
    "adamw": (2.5e-3, 5e-3, 1e-2),
    "lion": (3e-4, 6e-4, 1.2e-3),
    "muon": (2e-2, 4e-2, 8e-2),
}
MOST_RATES = 12  # where no rate trains at all there is none between worse ones


def candidate(optimizer: str, rate: float, *, steps: int, seed: int, **changes: Any) -> Config:
    """A run of the sweep; `changes` are fields of `Config`."""
    base = preset("tiny", optimizer)
    optim: Any = dataclasses.replace(base.optim, learning_rate=rate, weight_decay=WEIGHT_DECAY)
    warmup = round(base.warmup * steps / base.steps)
    fields = {"optim": optim, "steps": steps, "warmup_steps": warmup, "seed": seed, **changes}
    return dataclasses.replace(base, **fields)


def measure(run: Config, after_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Trains without checkpoints, and evaluates once.

    Returns:
      heldout_loss: nats a byte at the end; None if the loss was not finite somewhere.
      state_bytes: of the optimizer, per parameter.
      seconds: a step, the batch included: medians of steps with and without a sample of
        curvature, weighted by their numbers.
      command: trains the same run with all that the trainer keeps.
    """
    programs = program.assemble(run)
    state, times, loss = programs.init(), {}, math.nan
    for step in range(run.steps):
        start, due = time.perf_counter(), programs.optimizer.due(step)
        state, measured = programs.step(state, programs.batch(step), due=due)
        loss = float(jax.block_until_ready((state, measured))[1]["loss"])
        times.setdefault(due.refresh, []).append(time.perf_counter() - start)
        after_step()
        if not math.isfinite(loss):
            break
    else:
        loss = programs.evaluate(state.params)["heldout_loss"]
    shapes = jax.tree.leaves(programs.abstract.opt_state)
    size = optax.tree.size(state.params)
    return {
        "heldout_loss": loss if math.isfinite(loss) else None,
        "state_bytes": sum(x.size * x.dtype.itemsize for x in shapes) / size,
        "seconds": seconds_per_step(times),
        "command": command_line.command(run),
    }


def seconds_per_step(times: Mapping[Any, Sequence[float]]) -> float:
    """The median of each kind of step, weighted by how many there are; the first one compiles."""
    weighted = [len(kind) * statistics.median(kind[1:] or kind) for kind in times.values()]
    return sum(weighted) / sum(map(len, times.values()))


class Finished:
    """Measured runs in a file, by the hash of their config; the missing ones are trained."""

    def __init__(self, path: Path, progress: Progress):
        self.path, self.progress = path, progress
        try:
            self.runs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise ValueError(
                f"{path} holds no finished runs ({error}): delete it to begin anew, or name "
                "another file with --json."
            ) from error

    def __call__(self, run: Config) -> dict[str, Any]:
        """The figures of a run, with an infinite loss where it diverged."""
        if run.hash not in self.runs:
            self.runs[run.hash] = self._train(run)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self.path.with_suffix(".part")  # an interruption leaves the old file
            whole.write_text(json.dumps(self.runs, indent=1) + "\n")
            whole.replace(self.path)
        row = self.runs[run.hash]
        return row | {"heldout_loss": math.inf if (x := row["heldout_loss"]) is None else x}

    def _train(self, run: Config) -> dict[str, Any]:
        name = f"{run.name} at {run.optim.learning_rate:g}, seed {run.seed}"
        task, start = self.progress.add_task(name, total=run.steps), time.perf_counter()
        try:
            row = measure(run, after_step=lambda: self.progress.advance(task))
        finally:
            self.progress.remove_task(task)
        loss, seconds = row["heldout_loss"], time.perf_counter() - start
        result = "diverged" if loss is None else f"{loss:.4f} nats"
        self.progress.print(f"{name}: {result}, {seconds:.0f} s", highlight=False)
        return row


def search(loss_at: Callable[[float], float], rates: Sequence[float]) -> dict[float, float]:
    """The losses at these rates, and by factors of 2 beyond, until the best one is interior."""
    losses = {rate: loss_at(rate) for rate in rates}
    while len(losses) < MOST_RATES:
        best = best_of(losses)
        if best == max(losses):
            further = 2 * best
        elif best == min(losses):
            further = best / 2
        else:
            break
        losses[further] = loss_at(further)
    return dict(sorted(losses.items()))


def best_of(losses: Mapping[float, float]) -> float:
    """The rate of least loss, the lower one of equals: where all diverge that is where to go."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def tune(optimizer: str, finished: Finished, *, seeds: int, **budget: Any) -> dict[str, Any]:
    """A row of the table: the best rate, its neighbours, its figures at each seed."""

    def at(rate: float, seed: int) -> dict[str, Any]:
        return finished(candidate(optimizer, rate, seed=seed, **budget))

    losses = search(lambda rate: at(rate, 0)["heldout_loss"], GRIDS[optimizer])
    rates = list(losses)
    best = best_of(losses)
    runs = [at(best, seed) for seed in range(seeds)]
    i = rates.index(best)
    return {
        "rate": best,
        "half": losses[rates[i - 1]] if i else None,
        "twice": losses[rates[i + 1]] if i + 1 < len(rates) else None,
        "losses": [run["heldout_loss"] for run in runs],
        "state_bytes": runs[0]["state_bytes"],
        "seconds": statistics.median(run["seconds"] for run in runs),
        "command": runs[0]["command"],
    }


def sweep(
    optimizers: Sequence[str], path: Path, console: Console, **budget: Any
) -> dict[str, dict[str, Any]]:
    """A row for each optimizer; `budget` is `steps`, `seeds`, and other fields of `Config`."""
    rows = {}
    with _progress(console) as progress:
        finished = Finished(path, progress)
        total = progress.add_task("optimizers", total=len(optimizers))
        for name in optimizers:
            rows[name] = tune(name, finished, **budget)
            progress.advance(total)
    return rows


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def show(rows: Mapping[str, dict[str, Any]], steps: int, console: Console) -> None:
    """The table, best first."""
    seeds = len(next(iter(rows.values()))["losses"])
    over = f"mean of seeds 0 to {seeds - 1}, ± standard error" if seeds > 1 else "seed 0"
    table = Table(
        title=f"held-out loss of the tiny model after {steps} steps, {over}",
        caption="half, twice: nats at those rates, seed 0; state: bytes a parameter",
    )
    table.add_column("optimizer")
    for column in ("rate", "half", "nats", "twice", "bits/byte", "to adamw", "state", "ms/step"):
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
            _difference(row["losses"], rows["adamw"]["losses"]) if "adamw" in rows else "",
            f"{row['state_bytes']:.1f}",
            f"{1e3 * row['seconds']:.1f}",
        )
    console.print(table)


def ranked(rows: Mapping[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(rows.items(), key=lambda item: statistics.mean(item[1]["losses"]))


def _difference(losses: Sequence[float], others: Sequence[float]) -> str:
    """Seed by seed, so that what a seed does to both cancels."""
    gaps = [a - b for a, b in zip(losses, others, strict=True)]
    mean = f"{statistics.mean(gaps):+.3f}"
    if len(gaps) < 2 or not all(map(math.isfinite, gaps)):
        return mean
    return f"{mean} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.3f}"


def advice(rows: Mapping[str, dict[str, Any]], path: Path, *, steps: int, seeds: int) -> str:
    """What the table does not say, and what to do next; the last line is a command."""
    lines = []
    for name, row in rows.items():
        own = preset("tiny", name).optim.learning_rate
        if None in (row["half"], row["twice"]):
            lines.append(f"{name}: no rate among {MOST_RATES} is better than both its neighbours.")
        elif not math.isclose(row["rate"], own):
            lines.append(f"{name}: best at {row['rate']:g}; its preset has {own:g}.")
    name, best = ranked(rows)[0]
    lines.append(f"To look at {name}, with samples and curves:\n{best['command']}")
    length = preset().steps
    if seeds < 3:
        lines.append(
            "Seeds differ by about .01 nats. To tell close ones apart, with standard errors:"
        )
        seeds = 3
    else:
        lines.append("To see whether the order holds in a longer run:")
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
        help=f"some of {', '.join(GRIDS)} (all)",
    )
    parser.add_argument("--steps", type=int, default=400, help="length of a run (400)")
    parser.add_argument("--seeds", type=int, default=1, help="runs at the best rate (1)")
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
        sys.exit(f"stopped; finished runs are in {options.json}, and the same command goes on")
    except ValueError as error:
        sys.exit(f"error: {error}")
    show(rows, options.steps, Console(width=100))
    console.print(
        advice(rows, options.json, **budget), highlight=False, markup=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
