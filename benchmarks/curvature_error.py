"""Error and overhead of curvature samples: `python -m benchmarks.curvature_error`.

About ten minutes on two cores.

The model is the tiny preset, stopped half-way through its training. The batch has 480 sequences
that the model has not seen. Rows are shuffled between draws, so the error of a sub-batch includes
the choice of its rows as well as the labels.

Gauss-Newton samples are compared with a reference: the mean of 20,160 independent squares of one
sequence each (42 draws of labels for all 480). The reference has an error of its own, which is
printed, and subtracted from totals.

Hutchinson's samples are too noisy for such a reference. Their total error needs none: the samples
are unbiased, so the numerator is their variance, and the denominator is the mean product of two of
them. Medians are over coordinates drawn at random. Their reference is the mean of products with
probes that are 0 at all other coordinates, which removes most of the noise.

Overhead is what one sample in ten steps adds to the operations of steps without samples, by XLA's
count for the unoptimized program. It is proportional to the number of sampled rows, and does not
depend on the groups.
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
from rich.progress import track

from benchmarks.curvature_error_tables import show
from benchmarks.moments import Moments, moments, relative_squared_error
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
GROUPS = (1, 4, 8, 16, None)  # None: one group per row
HUTCHINSON = (  # every n-th row, groups; the first gives the denominator of all errors
    *((1, None), (1, 1), (1, 16)),
    *((n, groups) for n in (10, 15, 30) for groups in (1, 4, None)),
)
UPDATE_INTERVAL = 10


class Problem(NamedTuple):
    """A trained model and rows int[B, T + 1]; all functions take flat parameters."""

    theta: Flat
    logits_fn: Callable[[Flat, jax.Array], jax.Array]
    loss_fn: Callable[[Flat, jax.Array], jax.Array]
    rows: jax.Array


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
    """Samples float[P]; each draw shuffles the rows again."""

    @jax.jit
    def sample(theta, rows, key):
        order, draw = jax.random.split(key)
        rows = jax.random.permutation(order, rows)
        return estimator(draw, theta, None, obj_fn=p.loss_fn, logits_fn=p.logits_fn, inputs=rows)

    # Not under vmap: with jaxlib 0.10.2 on CPU, the pullback of a norm under vmap over keys can be
    # silently wrong.
    for key in jax.random.split(jax.random.key(seed), number):
        yield np.asarray(sample(p.theta, p.rows, key))


def of_groups(p: Problem, fraction: int, groups: int | None) -> Any:
    """The estimator on every n-th row; None is one group per row."""
    groups = len(p.rows) // fraction if groups is None else groups
    return gauss_newton_bartlett(batch_fraction=1 / fraction, groups=groups)


def gauss_newton_rows(p: Problem, reference: Moments, number: int) -> list[Row]:
    """Figures for each fraction of the batch and each number of groups that divides it."""
    rows = []
    for fraction, groups in track(list(itertools.product(FRACTIONS, GROUPS)), "Gauss-Newton"):
        used = len(p.rows) // fraction
        if len(p.rows) % fraction or used % (groups or 1):
            continue
        samples = draws(p, of_groups(p, fraction, groups), number, seed=1)
        place = {"fraction": fraction, "rows": used, "groups": groups}
        rows.append(place | relative_squared_error(samples, reference))
    return rows


def hutchinson_rows(p: Problem, number: int, coordinates: int, probes: int) -> list[Row]:
    """Figures without a reference for all coordinates (see the top of this file)."""
    chosen = jax.random.choice(jax.random.key(2), p.theta.size, (coordinates,), replace=False)
    exact = moments(some_of_the_diagonal(p, chosen, probes))
    rows, scale = [], None
    for fraction, groups in track(HUTCHINSON, "Hutchinson"):
        used = len(p.rows) // fraction
        if len(p.rows) % fraction or used % (groups or 1):
            continue
        estimator = hutchinson(batch_fraction=1 / fraction, groups=groups or used)
        sampled = moments(draws(p, estimator, number, seed=3))
        scale = scale or sampled.squared_mean.sum()  # the whole batch has the least noise
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
    """Samples float[coordinates] of the chosen entries of the Hessian's diagonal, on all rows."""

    @jax.jit
    def sample(theta, rows, key):
        signs = jax.random.rademacher(key, chosen.shape, theta.dtype)
        u = jnp.zeros_like(theta).at[chosen].set(signs)
        gradient = jax.grad(p.loss_fn)
        return signs * jax.jvp(lambda theta: gradient(theta, rows), (theta,), (u,))[1][chosen]

    for key in jax.random.split(jax.random.key(4), probes):
        yield np.asarray(sample(p.theta, p.rows, key))


def costs(p: Problem) -> dict[str, float]:
    """Operations of a sample of all rows, in units of their loss and gradient."""
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
    """Figures of all samples and of their references."""
    p = problem(config, steps, rows)
    cost = costs(p)
    reference = moments(draws(p, of_groups(p, 1, None), reference_draws))
    own = reference.squared_standard_error
    found = {
        "parameters": p.theta.size,
        "loss": float(p.loss_fn(p.theta, p.rows)),
        "update_interval": UPDATE_INTERVAL,
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


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.curvature_error",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=600, help="training steps out of 1200 (600)")
    parser.add_argument("--rows", type=int, default=480, help="sequences in the batch (480)")
    parser.add_argument("--reference", type=int, default=42, help="draws in the reference (42)")
    parser.add_argument("--draws", type=int, default=30, help="samples of each kind (30)")
    parser.add_argument("--coordinates", type=int, default=256, help="in Hutchinson's median (256)")
    parser.add_argument("--probes", type=int, default=32, help="probes in their reference (32)")
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
