"""Error against overhead of curvature samples: `python -m benchmarks.curvature_error`.

About ten minutes on two cores.

The tiny preset is stopped half-way; 480 sequences that it has not seen are the batch. A sample is
judged by the mean of 20,160 independent squares of one sequence each, 42 draws of the labels of
all 480, whose own error is printed, and subtracted from totals. Rows are shuffled between draws, so
the error has the sub-batch's share as well as the labels'.

Hutchinson's samples cannot be averaged to a reference in reasonable time. The total error needs
none: samples are unbiased, so their variance is the numerator, and their products with one another
make the denominator. Medians are over some coordinates drawn at random, whose reference is the mean
of products with probes that are 0 elsewhere: only the entries between those disturb it.

Overhead is operations beyond those of steps without samples, at one sample in ten steps, by XLA's
count of the unoptimized program; they are in proportion to the rows, and the same for any groups.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models import split
from sophia_optax import gauss_newton_bartlett, hutchinson, value_grad_and_hessian
from train import data, program
from train.config.presets import preset
from train.config.schema import Config
from train.data.tasks.windows import Windows
from train.step.batch import next_tokens
from train.step.loss import mean_loss

Flat = jax.Array  # float[P], all parameters
Row = dict[str, Any]
FRACTIONS = (1, 2, 4, 8, 10, 16, 24, 48)  # every n-th row
GROUPS = (1, 4, 8, 16, None)  # None: one for each row
HUTCHINSON = (  # every n-th row, groups; first what the scale of all is taken from
    *((1, None), (1, 1), (1, 16)),
    *((n, groups) for n in (10, 15, 30) for groups in (1, 4, None)),
)
UPDATE_INTERVAL = 10
PAPER, DEFAULT = (2, 1), (10, None)


class Problem(NamedTuple):
    """A trained model and rows int[B, T + 1]; all functions are of flat parameters."""

    theta: Flat
    logits_fn: Callable[[Flat, jax.Array], jax.Array]
    loss_fn: Callable[[Flat, jax.Array], jax.Array]
    rows: jax.Array


class Moments(NamedTuple):
    """Of independent draws of one vector, float64[P]."""

    draws: int
    mean: np.ndarray
    variance: np.ndarray  # of one draw, unbiased

    @property
    def squared_standard_error(self) -> np.ndarray:
        return self.variance / self.draws

    @property
    def squared_mean(self) -> np.ndarray:
        """Unbiased for the square of the expectation: the mean product of two distinct draws."""
        return self.mean**2 - self.squared_standard_error


def moments(draws: Iterable[np.ndarray]) -> Moments:
    number, total, squares = 0, np.float64(0), np.float64(0)
    for number, h in enumerate(draws, 1):  # noqa: B007
        h = np.asarray(h, np.float64)
        total, squares = total + h, squares + h**2
    variance = (squares - total**2 / number) / (number - 1)
    return Moments(number, np.asarray(total / number), np.asarray(variance))


def problem(run: Config, steps: int, rows: int) -> Problem:
    """The model after `steps` steps of `run`, and held-out rows."""
    programs = program.assemble(run, jax.devices()[:1])
    state = programs.init()
    for step in range(steps):
        state, _ = programs.step(state, programs.batch(step), due=programs.optimizer.due(step))
    return flat_problem(split(run.model).apply, state.params, unseen(run, rows))


def unseen(run: Config, rows: int) -> jax.Array:
    heldout, length = data.shakespeare().heldout, run.sequence_length
    windows = Windows(
        heldout, stride=length, extra=1, seed=1, vocab_size=256, where="the embedded text"
    )
    return jnp.asarray(windows.shuffled(np.arange(rows)))


def flat_problem(apply: Callable[..., jax.Array], params: Any, rows: jax.Array) -> Problem:
    theta, unravel = ravel_pytree(params)

    def logits_fn(theta, rows):
        return apply(unravel(theta), rows[:, :-1])

    def loss_fn(theta, rows):
        return mean_loss(logits_fn(theta, rows), next_tokens(rows))

    return Problem(theta, logits_fn, loss_fn, rows)


def draws(p: Problem, estimator: Any, number: int, *, seed: int = 0) -> Iterable[np.ndarray]:
    """Samples float[P], each of the rows in an order of its own."""

    @jax.jit
    def sample(theta, rows, key):
        order, draw = jax.random.split(key)
        rows = jax.random.permutation(order, rows)
        return estimator(draw, theta, None, obj_fn=p.loss_fn, logits_fn=p.logits_fn, inputs=rows)

    # One by one and not under vmap: with jaxlib 0.10.2 on the CPU the pullback of a norm under
    # vmap over keys can be wrong without a word.
    for key in jax.random.split(jax.random.key(seed), number):
        yield np.asarray(sample(p.theta, p.rows, key))


def of_groups(p: Problem, fraction: int, groups: int | None) -> Any:
    groups = len(p.rows) // fraction if groups is None else groups
    return gauss_newton_bartlett(batch_fraction=1 / fraction, groups=groups)


def gauss_newton_rows(p: Problem, reference: Moments, number: int) -> list[Row]:
    """A row of figures for each share of the batch and each number of groups that divides it."""
    rows = []
    for fraction, groups in track(list(itertools.product(FRACTIONS, GROUPS)), "Gauss-Newton"):
        used = len(p.rows) // fraction
        if len(p.rows) % fraction or used % (groups or 1):
            continue
        samples = draws(p, of_groups(p, fraction, groups), number, seed=1)
        place = {"fraction": fraction, "rows": used, "groups": groups}
        rows.append(place | errors(samples, reference))
    return rows


def errors(samples: Iterable[np.ndarray], reference: Moments) -> Row:
    """Relative squared error: total with standard error, median over coordinates."""
    noise = reference.squared_standard_error
    scale = reference.squared_mean.sum()
    squares = np.stack([(h.astype(np.float64) - reference.mean) ** 2 for h in samples])
    totals = (squares.sum(1) - noise.sum()) / scale
    return {
        "total_error": float(totals.mean()),
        "standard_error": float(totals.std(ddof=1) / len(totals) ** 0.5),
        "median_error": float(np.median(squares.mean(0) / reference.mean**2)),
    }


def hutchinson_rows(p: Problem, number: int, coordinates: int, probes: int) -> list[Row]:
    """Rows of figures without a reference for all coordinates (see the top)."""
    chosen = jax.random.choice(jax.random.key(2), p.theta.size, (coordinates,), replace=False)
    exact = moments(some_of_the_diagonal(p, chosen, probes))
    rows, scale = [], None
    for fraction, groups in track(HUTCHINSON, "Hutchinson"):
        used = len(p.rows) // fraction
        if len(p.rows) % fraction or used % (groups or 1):
            continue
        estimator = hutchinson(batch_fraction=1 / fraction, groups=groups or used)
        sampled = moments(draws(p, estimator, number, seed=3))
        scale = scale or sampled.squared_mean.sum()  # of the whole batch, the least noisy
        of_chosen = sampled.variance[chosen] / exact.mean**2
        rows.append(
            {
                "fraction": fraction,
                "rows": used,
                "groups": groups,
                "total_error": float(sampled.variance.sum() / scale),
                "median_error": float(np.median(of_chosen)),
            }
        )
    own = exact.squared_standard_error.sum() / exact.squared_mean.sum()
    return [row | {"reference_error": float(own)} for row in rows]


def some_of_the_diagonal(p: Problem, chosen: jax.Array, probes: int) -> Iterable[np.ndarray]:
    """Samples float[coordinates] of these entries of the Hessian's diagonal on all rows."""

    @jax.jit
    def sample(theta, rows, key):
        signs = jax.random.rademacher(key, chosen.shape, theta.dtype)
        u = jnp.zeros_like(theta).at[chosen].set(signs)
        gradient = jax.grad(p.loss_fn)
        return signs * jax.jvp(lambda theta: gradient(theta, rows), (theta,), (u,))[1][chosen]

    for key in jax.random.split(jax.random.key(4), probes):
        yield np.asarray(sample(p.theta, p.rows, key))


def costs(p: Problem) -> dict[str, float]:
    """Operations of a sample of all rows, in those of loss and gradient of them."""
    key, rows = jax.random.key(0), p.rows[:16]
    plain = flops(jax.value_and_grad(p.loss_fn), p.theta, rows)

    def shared(theta, rows):
        def loss_fn(logits, rows):
            return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])

        both = value_grad_and_hessian(gauss_newton_bartlett())
        return both(key, theta, logits_fn=p.logits_fn, loss_fn=loss_fn, inputs=rows)

    def apart(estimator, theta, rows):
        extra = {"obj_fn": p.loss_fn, "logits_fn": p.logits_fn, "inputs": rows}
        return estimator(key, theta, None, **extra)

    return {
        "shared": flops(shared, p.theta, rows) / plain - 1,
        "apart": flops(partial(apart, gauss_newton_bartlett()), p.theta, rows) / plain,
        "hutchinson": flops(partial(apart, hutchinson()), p.theta, rows) / plain,
    }


def flops(function: Callable[..., Any], *args: Any) -> float:
    analysis: Any = jax.jit(function).lower(*args).cost_analysis()
    return analysis["flops"]


def run(
    config: Config,
    *,
    steps: int,
    rows: int,
    reference_draws: int,
    number: int,
    coordinates: int,
    probes: int,
) -> dict[str, Any]:
    """Figures of all samples, and of what they are judged by."""
    p = problem(config, steps, rows)
    cost = costs(p)
    reference = moments(draws(p, of_groups(p, 1, None), reference_draws))
    own = reference.squared_standard_error
    found = {
        "parameters": p.theta.size,
        "loss": float(p.loss_fn(p.theta, p.rows)),
        "costs": cost,
        "reference_error": float(own.sum() / reference.squared_mean.sum()),
        "reference_median_error": float(np.median(own / reference.mean**2)),
        "gauss_newton_bartlett": gauss_newton_rows(p, reference, number),
        "hutchinson": hutchinson_rows(p, number, coordinates, probes),
    }
    for row in found["gauss_newton_bartlett"]:
        row["overhead"] = cost["shared"] / row["fraction"] / UPDATE_INTERVAL
        row["overhead_apart"] = cost["apart"] / row["fraction"] / UPDATE_INTERVAL
    for row in found["hutchinson"]:
        row["overhead"] = cost["hutchinson"] / row["fraction"] / UPDATE_INTERVAL
    return found


def show(found: dict[str, Any]) -> None:
    console = Console(width=105)
    cells = {(row["fraction"], row["groups"]): row for row in found["gauss_newton_bartlett"]}
    show_gauss_newton(cells, console)
    one, more = (
        max(row["standard_error"] / row["total_error"] for row in cells.values() if chosen(row))
        for chosen in (lambda row: row["groups"] == 1, lambda row: row["groups"] != 1)
    )
    console.print(
        f"{found['parameters']} parameters, loss {found['loss']:.3f}. Standard errors of totals: "
        f"up to {one:.0%} with one group, {more:.0%} with more. The reference's own error, "
        f"subtracted from totals: {found['reference_error']:.1e}; median coordinate "
        f"{found['reference_median_error']:.1e}.",
        highlight=False,
    )
    table = Table(title="Hutchinson: relative squared error of one sample")
    for column in ("rows", "groups", "overhead", "total", "median", "its reference's own"):
        table.add_column(column, justify="right")
    for row in found["hutchinson"]:
        errors = (f"{row[key]:.3g}" for key in ("total_error", "median_error", "reference_error"))
        table.add_row(_rows(row), str(row["groups"] or "a row"), f"{row['overhead']:.2%}", *errors)
    console.print(table)


def show_gauss_newton(cells: dict[tuple[int, int | None], Row], console: Console) -> None:
    paper = cells.get(PAPER)
    apart = f", {paper['overhead_apart']:.2%} with a forward pass of its own" if paper else ""
    table = Table(
        title="Gauss-Newton-Bartlett: relative squared error of a sample, total / median",
        caption=f"one sample in {UPDATE_INTERVAL} steps; * the paper's{apart}; ** the default",
    )
    for column in ("rows", "overhead"):
        table.add_column(column, justify="right")
    for groups in GROUPS:
        name = f"{groups} group{'s' * (groups > 1)}" if groups else "a group a row"
        table.add_column(name, justify="right")
    for fraction in FRACTIONS:
        if row := cells.get((fraction, None)):
            errors = (_cell(cells, fraction, groups) for groups in GROUPS)
            table.add_row(_rows(row), f"{row['overhead']:.2%}", *errors)
    console.print(table)


def _rows(row: Row) -> str:
    return f"{row['rows']} = 1/{row['fraction']}"


def _cell(cells: dict[tuple[int, int | None], Row], fraction: int, groups: int | None) -> str:
    if (row := cells.get((fraction, groups))) is None:
        return "-"
    mark = {PAPER: " *", DEFAULT: " **"}.get((fraction, groups), "")
    return " / ".join(f"{row[key]:.2g}" for key in ("total_error", "median_error")) + mark


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.curvature_error",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=600, help="training steps, of 1200 (600)")
    parser.add_argument("--rows", type=int, default=480, help="sequences in the batch (480)")
    parser.add_argument("--reference", type=int, default=42, help="draws of the reference (42)")
    parser.add_argument("--draws", type=int, default=30, help="samples of each (30)")
    parser.add_argument("--coordinates", type=int, default=256, help="of Hutchinson's median (256)")
    parser.add_argument("--probes", type=int, default=32, help="of their reference (32)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(args)
    program.use_compile_cache(preset().output.compile_cache)
    found = run(
        preset(),
        steps=options.steps,
        rows=options.rows,
        reference_draws=options.reference,
        number=options.draws,
        coordinates=options.coordinates,
        probes=options.probes,
    )
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
