"""What one update moves: `python -m benchmarks.update_cost` (two minutes on two cores).

XLA's own count of the bytes that a compiled update accesses, its temporaries, and its wall time
over that of optax.adamw, interleaved in one process. The gradient is an input: the cost of a
sample of curvature is not in these figures, that of averaging one is. All state and parameters
are float32 and donated. The floor of Sophia is 24 bytes a parameter (read p, g, m, h; write p, m),
that of AdamW 28; XLA on CPU does not fuse several outputs into one loop.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import sophia_optax

Compiled = Any  # jax.stages.Compiled, whose analyses are typed as optional
LEARNING_RATE = 1e-3


def by_hand() -> optax.GradientTransformation:
    """Sophia between refreshes, written as one function: what the chain is measured against."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):
        m = jax.tree.map(lambda g, m: 0.965 * m + 0.035 * g, updates, state[0])

        def step(m, h, p):
            ratio = jnp.clip(m / jnp.maximum(0.01 * h, 1e-12), -1, 1)
            return -LEARNING_RATE * (ratio + 1e-4 * p)

        return jax.tree.map(step, m, state[1], params), (m, state[1])

    return optax.GradientTransformation(init, update)


def cases() -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """Name -> (transformation, extra arguments, whether a sample of curvature is an input)."""
    uncorrected = sophia_optax.sophia_g(LEARNING_RATE, debias_momentum=False, debias_hessian=False)
    plain = {"refresh": False}
    rate = LEARNING_RATE
    clipped = optax.chain(optax.clip_by_global_norm(1.0), sophia_optax.sophia_g(rate))
    obj_fn = {"obj_fn": lambda p: sum(jnp.vdot(x, x) for x in jax.tree.leaves(p)) / 2}
    return {
        "optax.sgd": (optax.sgd(rate), {}, False),
        "optax.adamw": (optax.adamw(rate), {}, False),
        "optax.lion": (optax.lion(rate), {}, False),
        "optax.contrib.sophia, all in": (optax.contrib.sophia(rate), obj_fn, False),
        "Sophia by hand, between refreshes": (by_hand(), {}, False),
        "sophia_h, between refreshes": (sophia_optax.sophia_h(rate), plain, False),
        "sophia_g, between refreshes": (sophia_optax.sophia_g(rate), plain, False),
        "sophia_g, no bias correction": (uncorrected, plain, False),
        "sophia_g, global-norm clip before": (clipped, plain, False),
        "sophia_g, refresh, statistics on": (sophia_optax.sophia_g(rate), {}, True),
        "sophia_g, refresh, statistics off": (
            sophia_optax.sophia_g(rate, statistics=False),
            {},
            True,
        ),
    }


def compile_update(tx, extra: dict[str, Any], sampled: bool, params) -> tuple[Compiled, Any]:
    """(compiled program, its arguments)."""
    tx = optax.with_extra_args_support(tx)

    def update(params, state, grads, sample):
        more = {"hessian": sample} if sampled else {}
        updates, state = tx.update(grads, state, params, **extra, **more)
        return optax.apply_updates(params, updates), state

    grads = jax.tree.map(lambda x: x * 1e-3, params)
    sample = jax.tree.map(jnp.square, grads) if sampled else None
    args = (params, tx.init(params), grads, sample)
    return jax.jit(update, donate_argnums=(0, 1)).lower(*args).compile(), args


def measure(program: Compiled, size: int) -> dict[str, float]:
    memory = program.memory_analysis()
    return {
        "bytes_per_parameter": program.cost_analysis()["bytes accessed"] / size,
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6,
    }


def wall_times(programs: dict[str, tuple[Compiled, Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program, interleaved so that all meet the same noise."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, (program, args) in programs.items():
            start = time.perf_counter()
            params, state = jax.block_until_ready(program(*args))
            programs[name] = (program, (params, state, *args[2:]))
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return times


def parameters(size: int, matrices: int = 8) -> dict[str, jax.Array]:
    columns = size // (matrices * 1024)
    keys = jax.random.split(jax.random.key(0), matrices)
    return {f"w{i}": jax.random.normal(k, (1024, columns)) for i, k in enumerate(keys)}


def run(size: int, rounds: int) -> dict[str, dict[str, float]]:
    """A row of figures for each case."""
    programs, rows = {}, {}
    for name, (tx, extra, sampled) in cases().items():
        params = parameters(size)
        program, arguments = compile_update(tx, extra, sampled, params)
        programs[name] = program, arguments
        rows[name] = measure(program, optax.tree.size(params))
    if rounds:
        times = wall_times(programs, rounds)
        for name, row in rows.items():
            ratios = [t / a for t, a in zip(times[name], times["optax.adamw"], strict=True)]
            row["time_over_adamw"] = statistics.median(ratios)
    return rows


def show(rows: dict[str, dict[str, float]], size: int) -> None:
    table = Table(title=f"one update of {size / 1e6:.1f} M float32 parameters")
    table.add_column("optimizer")
    for column in ("bytes / parameter", "temporaries (MB)", "time / optax.adamw"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        ratio = row.get("time_over_adamw")
        table.add_row(
            name,
            f"{row['bytes_per_parameter']:.1f}",
            f"{row['temporary_megabytes']:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=34_603_008, help="number of parameters")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; 0 counts bytes only")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    rows = run(args.size, args.rounds)
    show(rows, args.size)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
