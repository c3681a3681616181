"""Error and cost of curvature estimators: `python -m benchmarks.estimator_variance` (one minute).

A decoder with 3,760 parameters reads Shakespeare, folded to 32 symbols, and is stopped after 500 of
1,000 steps of Adam, so that its parameters are neither random nor fully trained. Hutchinson is
compared with the exact diagonal of the Hessian, the other estimators with the exact diagonal of the
Gauss-Newton matrix.

All estimators use the same batch, except the squared gradient. It has no noise on a fixed batch, so
it gets a new batch each time, and is compared with the mean diagonal of 16 batches.

Cost is XLA's count of floating-point operations, in units of one gradient of the same batch.
Groups run in parallel, because XLA counts the body of a loop once. The count includes random
numbers, whose share is smaller in larger models.

`notebooks/2_estimators.ipynb` explains the results, with a language of its own.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

from models import DecoderConfig, split
from sophia_optax import gauss_newton_bartlett, hutchinson, squared_gradient
from train import data
from train.data.tasks.windows import Windows

Flat = jax.Array  # float[P], all parameters
ROWS = 32
ESTIMATORS = {
    "Hutchinson, Rademacher": hutchinson(),
    "Hutchinson, normal": hutchinson(probe="normal"),
    "GNB, 1 group": gauss_newton_bartlett(),
    "GNB, 4 groups": gauss_newton_bartlett(groups=4, parallel_groups=4),
    "GNB, 16 groups": gauss_newton_bartlett(groups=16, parallel_groups=16),
}


class Problem(NamedTuple):
    """A trained model; rows are int[B, context + 1]."""

    theta: Flat
    logits_fn: Callable[[Flat, jax.Array], jax.Array]
    loss_fn: Callable[[Flat, jax.Array], jax.Array]
    batches: jax.Array  # int[number, ROWS, context + 1], not used in training


def texts(number: int, context: int, seed: int) -> jax.Array:
    folded = data.shakespeare().train % 32  # folds capitals into small letters
    windows = Windows(
        folded, stride=context, extra=1, seed=seed, vocab_size=32, where="the embedded text"
    )
    return jnp.asarray(windows.shuffled(np.arange(number * ROWS))).reshape(number, ROWS, -1)


def problem(width: int, steps: int, samples: int) -> Problem:
    config = DecoderConfig(vocab_size=32, context=8, width=width, layers=1, heads=2)
    model = split(config)
    theta, unravel = ravel_pytree(model.init(jax.random.key(0)))
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, 2 * steps))

    def logits_fn(theta, rows):
        return model.apply(unravel(theta), rows[:, :-1])

    def loss_fn(theta, rows):
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(logits_fn(theta, rows), rows[:, 1:]).mean()

    def step(carry, rows):
        theta, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(theta, rows), state)
        return (optax.apply_updates(theta, updates), state), None

    train = jax.jit(lambda theta, rows: jax.lax.scan(step, (theta, tx.init(theta)), rows)[0][0])
    theta = train(theta, texts(steps, config.context, seed=0))
    return Problem(theta, logits_fn, loss_fn, texts(samples, config.context, seed=1))


# lax.map instead of vmap, here and below: with jaxlib 0.10.2 on CPU, the pullback of a norm under
# vmap can be silently wrong.
def hessian_diagonal(p: Problem, rows: jax.Array) -> jax.Array:
    def entry(i):
        unit = jnp.zeros_like(p.theta).at[i].set(1)
        return jax.jvp(lambda theta: jax.grad(p.loss_fn)(theta, rows), (p.theta,), (unit,))[1][i]

    return jax.lax.map(entry, jnp.arange(p.theta.size))


def gauss_newton_diagonal(p: Problem, rows: jax.Array) -> jax.Array:
    """(1/B) Σ_n diag J_nᵀ (diag p_n - p_n p_nᵀ) J_n, J_n the Jacobian of prediction n's logits."""

    def of_row(row):
        logits, pullback = jax.vjp(lambda theta: p.logits_fn(theta, row[None])[0], p.theta)
        units = jnp.eye(logits.size).reshape(-1, *logits.shape)
        J = jax.lax.map(lambda unit: pullback(unit)[0], units).reshape(*logits.shape, -1)
        probability = jax.nn.softmax(logits)[..., None]
        first, second = (jnp.sum(probability * J**power, axis=1) for power in (1, 2))
        return jnp.sum(second - first**2, axis=0)

    return jax.lax.map(of_row, rows).sum(0) / rows[:, 1:].size


def draw(p: Problem, samples: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Samples of each estimator, float64[samples, P], and the cost of one in gradients."""
    batch, B = p.batches[0], p.batches[0, :, 1:].size
    keys = jax.random.split(jax.random.key(2), samples)
    # One theta per sample: otherwise XLA hoists work out of the loop, and out of the count.
    inputs = (jnp.tile(p.theta, (samples, 1)), keys, p.batches)
    gradient = jax.grad(p.loss_fn)

    def estimate(estimator, theta, key, rows):
        extra = {"obj_fn": p.loss_fn, "logits_fn": p.logits_fn, "inputs": batch}
        return estimator(key, theta, None, **extra)

    def square(theta, key, rows):
        return squared_gradient(scale=B)(key, None, gradient(theta, rows))

    one_gradient = flops(jax.jit(gradient).lower(p.theta, batch).compile())
    cases = {name: partial(estimate, estimator) for name, estimator in ESTIMATORS.items()}
    drawn, cost = {}, {}
    for name, sample in {**cases, "squared gradient": square}.items():
        one_by_one = jax.jit(partial(jax.lax.map, lambda x, f=sample: f(*x)))
        program = one_by_one.lower(inputs).compile()
        drawn[name] = np.asarray(program(inputs), np.float64)
        cost[name] = flops(program) / one_gradient
    return drawn, cost


def flops(program: Any) -> float:
    return program.cost_analysis()["flops"]


def run(width: int, steps: int, samples: int) -> dict[str, dict[str, float]]:
    """The figures of each estimator."""
    p = problem(width, steps, samples)
    gauss_newton = jax.jit(partial(gauss_newton_diagonal, p))
    several = np.stack([gauss_newton(rows) for rows in p.batches[:16]])
    exact: dict[str, np.ndarray] = {name: several[0] for name in ESTIMATORS if "GNB" in name}
    hessian = np.asarray(jax.jit(partial(hessian_diagonal, p))(p.batches[0]))
    exact |= {name: hessian for name in ESTIMATORS if "Hutchinson" in name}
    exact["squared gradient"] = several.mean(0)
    drawn, cost = draw(p, samples)
    return {
        name: figures(h, exact[name].astype(np.float64), cost[name]) for name, h in drawn.items()
    }


def figures(h: np.ndarray, exact: np.ndarray, cost: float) -> dict[str, float]:
    squared = ((h - exact) ** 2).mean(0)
    total = squared.sum() / (exact**2).sum()
    sums = h.sum(1) / exact.sum()
    return {
        "bias_of_sum": sums.mean() - 1,
        "bias_standard_error": sums.std(ddof=1) / len(sums) ** 0.5,
        "total_error": total,
        "median_error": float(np.median(squared / exact**2)),
        "cost_in_gradients": cost,
        "error_times_cost": total * cost,
    }


def show(rows: dict[str, dict[str, float]]) -> None:
    table = Table(title="one sample: relative squared error, and cost in gradients")
    table.add_column("estimator")
    for column in ("bias of the sum", "error, total", "median coordinate", "cost", "error x cost"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['bias_of_sum']:+.3f} ± {row['bias_standard_error']:.3f}",
            *(f"{row[key]:.2f}" for key in ("total_error", "median_error", "cost_in_gradients")),
            f"{row['error_times_cost']:.2f}",
        )
    Console(width=105).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=16, help="width of the decoder, even")
    parser.add_argument("--steps", type=int, default=500, help="training steps, half a schedule")
    parser.add_argument(
        "--samples", type=int, default=1000, help="samples of each estimator, at least 16"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    rows = run(args.width, args.steps, args.samples)
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
