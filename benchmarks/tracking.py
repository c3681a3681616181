"""How fast curvature should be averaged: `python -m benchmarks.tracking` (fifteen minutes).

The first table has the error of h along a run of the tiny preset. At every refresh, one sample of
each kind is taken and enters averages with several b2. These averages do not influence training.
At some steps, half an interval after a refresh, they are compared with the mean of independent
squares of one training sequence each. The error of that mean is subtracted. If a sample has more
rows than the step's batch, its rows come from another order of the training text.

The second table has the held-out loss at the end of runs that differ only in b2 and groups.
Finished runs are kept in a file, as in `benchmarks.leaderboard`; delete it after a change of code.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import rate_search
from benchmarks.moments import Moments, moments
from models import split
from sophia_optax import gauss_newton_bartlett
from train import data, program
from train.config.presets import preset
from train.config.schema import Config
from train.data.tasks.windows import Windows
from train.step.batch import Batch, next_tokens

PATH = Path("runs/tracking.json")
B2S = (0.5, 0.7, 0.85, 0.9, 0.95, 0.98, 0.99)
SAMPLES = ((16, 1), (16, 16), (48, 48), (240, 1))  # rows, groups
"""The batch in one group and with one group per row; the GPT-2 presets' sample; the paper's."""
CHECKED = (55, 155, 305, 605, 905, 1195)


class Average:
    """Bias-corrected averages of the same samples with several b2; h is float64[b2, P]."""

    def __init__(self, b2s: Sequence[float]):
        self.b2 = np.array(b2s)[:, None]
        self.h, self.mass = np.float64(0), np.float64(0)

    def add(self, sample: np.ndarray) -> None:
        self.h = self.b2 * self.h + (1 - self.b2) * sample
        self.mass = self.b2 * self.mass + (1 - self.b2)

    def errors(self, reference: Moments) -> list[float]:
        """Relative squared error of each average."""
        squares = ((self.h / self.mass - reference.mean) ** 2).sum(1)
        noise, scale = reference.squared_standard_error.sum(), reference.squared_mean.sum()
        return [float(x) for x in (squares - noise) / scale]


def track(
    config: Config,
    *,
    samples: Sequence[tuple[int, int]] = SAMPLES,
    b2s: Sequence[float] = B2S,
    checked: Sequence[int] = CHECKED,
    reference: tuple[int, int] = (960, 4),
) -> dict[str, Any]:
    """Errors of h by sample, step and b2; `reference` is (rows per draw, draws)."""
    programs = program.assemble(config, jax.devices()[:1])
    sample, state = sampler(config), programs.init()
    averages = {kind: Average(b2s) for kind in samples}
    found = {"b2": list(b2s), "step": list(checked), "errors": {str(kind): [] for kind in samples}}
    found |= {"reference_error": [], "size": []}
    for step in range(config.steps):
        due, batch = programs.optimizer.due(step), programs.batch(step)
        for i, (rows, groups) in enumerate(samples if due.refresh else ()):
            own = rows == config.batch_size
            inputs = batch if own else training_rows(config, 1, rows, step)
            key = jax.random.fold_in(jax.random.key(i), step)
            averages[rows, groups].add(sample(groups, state.params, inputs, key))
        if step in checked:
            truth = reference_at(config, step, *reference, partial(sample, params=state.params))
            for kind, average in averages.items():
                found["errors"][str(kind)].append(average.errors(truth))
            scale = truth.squared_mean.sum()
            found["reference_error"].append(float(truth.squared_standard_error.sum() / scale))
            found["size"].append(float(scale**0.5))
        state, _ = programs.step(state, batch, due=due)
    return found


def sampler(config: Config) -> Callable[..., np.ndarray]:
    """A function (groups, params, inputs, key) -> float[P], one Gauss-Newton sample."""
    model = split(config.model)

    def logits_fn(params, inputs):
        return model.apply(params, inputs.inputs)

    @partial(jax.jit, static_argnums=0)
    def compiled(groups, params, inputs, key):
        estimator: Any = gauss_newton_bartlett(groups=groups)
        return ravel_pytree(estimator(key, params, None, logits_fn=logits_fn, inputs=inputs))[0]

    def sample(groups, params, inputs, key):
        return np.asarray(compiled(groups, params, inputs, key))

    return sample


def reference_at(
    config: Config, step: int, rows: int, draws: int, sample: Callable[..., np.ndarray]
) -> Moments:
    """Moments of samples with one group per row, from rows in an order of their own."""
    keys = jax.random.split(jax.random.key(step), draws)
    return moments(
        sample(rows, inputs=training_rows(config, 2, rows, i), key=key)
        for i, key in enumerate(keys)
    )


def training_rows(config: Config, seed: int, rows: int, step: int) -> Batch:
    """Training sequences in another order than that of seed 0."""
    tokens, length = data.shakespeare().train, config.sequence_length
    windows = Windows(
        tokens, stride=length, extra=1, seed=seed, vocab_size=256, where="the embedded text"
    )
    return next_tokens(jnp.asarray(windows.shuffled(step * rows + np.arange(rows))))


def losses(
    path: Path,
    console: Console,
    *,
    b2s: Sequence[float],
    groups: Sequence[int],
    rates: Sequence[float],
    seeds: int,
    **budget: Any,
) -> list[dict[str, Any]]:
    """Held-out losses at the end of training, for each combination and seed."""
    rows = []
    with Progress(console=console) as progress:
        finished = rate_search.Finished(path, progress)
        for b2, number, rate in itertools.product(b2s, groups, rates):
            runs = [candidate(rate, b2, number, seed=seed, **budget) for seed in range(seeds)]
            ended = [finished(run)["heldout_loss"] for run in runs]
            rows.append({"b2": b2, "groups": number, "rate": rate, "losses": ended})
    return rows


def candidate(rate: float, b2: float, groups: int, **budget: Any) -> Config:
    run = rate_search.candidate("sophia-g", rate, **budget)
    optim: Any = run.optim
    optim = dataclasses.replace(optim, b2=b2, groups=groups, batch_fraction=1.0)
    return dataclasses.replace(run, optim=optim)


def show(found: dict[str, Any], console: Console) -> None:
    table = Table(title="relative squared error of h by b2, along a run; the smallest in bold")
    table.add_column("sample")
    for column in ("step", *(f"{b2:g}" for b2 in found["b2"])):
        table.add_column(column, justify="right")
    for kind, errors in found["errors"].items():
        for step, by_b2 in zip(found["step"], errors, strict=True):
            cells = [f"[bold]{x:.3f}[/bold]" if x == min(by_b2) else f"{x:.3f}" for x in by_b2]
            table.add_row(kind if step == found["step"][0] else "", str(step), *cells)
        table.add_section()
    console.print(table)
    own = ", ".join(f"{x:.1e}" for x in found["reference_error"])
    console.print(f"Error of the references, subtracted: {own}.", highlight=False)


def show_losses(rows: Sequence[dict[str, Any]], console: Console) -> None:
    seeds = len(rows[0]["losses"])
    table = Table(title=f"final held-out loss in nats per byte, seeds 0 to {seeds - 1}")
    for column in ("rate", "groups", "b2", "each seed", "mean ± standard error"):
        table.add_column(column, justify="right")
    for row in sorted(rows, key=lambda row: (row["rate"], row["groups"], row["b2"])):
        ended = row["losses"]
        each = ", ".join(f"{loss:.3f}" for loss in ended)
        mean = f"[bold]{statistics.mean(ended):.3f}[/bold]"
        if seeds > 1:
            mean += f" ± {statistics.stdev(ended) / seeds**0.5:.3f}"
        table.add_row(f"{row['rate']:g}", str(row["groups"]), f"{row['b2']:g}", each, mean)
    console.print(table)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tracking",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--skip-tracking", action="store_true", help="only compare losses")
    parser.add_argument("--b2", type=float, nargs="*", default=(0.8, 0.9, 0.95, 0.99))
    parser.add_argument("--groups", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--rates", type=float, nargs="+", default=(1.5e-3,))
    parser.add_argument("--steps", type=int, default=400, help="steps of the compared runs (400)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each run (3)")
    parser.add_argument("--runs", type=Path, default=PATH, help=f"file of finished runs ({PATH})")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(args)
    program.use_compile_cache(preset().output.compile_cache)
    console, found = Console(width=100), {}
    if not options.skip_tracking:
        found["tracking"] = track(preset())
        show(found["tracking"], console)
    if options.b2:
        sweep = {"b2s": options.b2, "groups": options.groups, "rates": options.rates}
        budget = {"steps": options.steps, "seeds": options.seeds}
        found["losses"] = losses(options.runs, console, **sweep, **budget)
        show_losses(found["losses"], console)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
