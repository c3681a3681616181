"""Held-out losses of optimizers at tuned learning rates, each run trained at most once.

A search tries three rates a factor of 2 apart, then further ones, until the best rate has a worse
neighbour on both sides. `Finished` keeps the results of runs in a file, so an interrupted search
continues, and a wider one reuses them.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train import program
from train.config import command_line
from train.config.presets import preset
from train.config.schema import Config

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
MOST_RATES = 12  # a search must end even if every rate diverges


def candidate(optimizer: str, rate: float, *, steps: int, seed: int, **changes: Any) -> Config:
    """The run of one optimizer at one rate; `changes` are fields of `Config`."""
    base = preset("tiny", optimizer)
    optim: Any = dataclasses.replace(base.optim, learning_rate=rate, weight_decay=WEIGHT_DECAY)
    warmup = round(base.warmup * steps / base.steps)
    fields = {"optim": optim, "steps": steps, "warmup_steps": warmup, "seed": seed, **changes}
    return dataclasses.replace(base, **fields)


def measure(run: Config, after_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Trains without checkpoints, then evaluates once.

    Returns:
      heldout_loss: nats per byte at the end; None if a training loss was not finite.
      state_bytes: bytes of optimizer state per parameter.
      seconds: time of a step, including its batch. It is the weighted mean of two medians: of
        steps with a sample of curvature and of steps without.
      command: a command that trains the same run with everything that the trainer writes.
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
    """Mean over kinds of steps of their medians; the first step of a kind compiles."""
    weighted = [len(kind) * statistics.median(kind[1:] or kind) for kind in times.values()]
    return sum(weighted) / sum(map(len, times.values()))


class Finished:
    """A file of measured runs, by the hash of their config. It trains runs that the file lacks."""

    def __init__(self, path: Path, progress: Progress):
        self.path, self.progress = path, progress
        try:
            self.runs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise ValueError(
                f"{path} holds no finished runs ({error}): delete it to start again, or name "
                "another file with --json."
            ) from error

    def __call__(self, run: Config) -> dict[str, Any]:
        """The figures of a run. Its loss is infinite if the run diverged."""
        if run.hash not in self.runs:
            self.runs[run.hash] = self._train(run)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self.path.with_suffix(".part")  # an interruption must not damage the file
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
    """Losses at these rates and, by factors of 2, beyond them, until the best rate is interior."""
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
    """The rate with the least loss. If all diverge it is the lowest, so the search goes down."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def tune(optimizer: str, finished: Finished, *, seeds: int, **budget: Any) -> dict[str, Any]:
    """A row of the table: the best rate, its loss at each seed, and its neighbours."""

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
    """A row for each optimizer. `budget` has `steps`, `seeds` and other fields of `Config`."""
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
