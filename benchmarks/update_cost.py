"""What one update moves: `python -m benchmarks.update_cost` (five minutes on two cores).

For a compiled update: XLA's count of the bytes that it accesses, of its temporaries and of its
floating-point operations, and its wall time relative to optax.adamw. The two are timed in turn,
update by update. The gradient is an input. A sample of curvature is an input too, so the figures
include the cost of averaging a sample, but not of computing it. Parameters and gradients are
float32. Parameters and state are donated.

`floor` counts each input read once and each output written once. For Sophia these are p, g, m, h
and p, m: 24 bytes per parameter; for AdamW, 28. XLA on CPU has a loop for each output: one reads
g, m and writes m, another reads p, m, h and writes p. This makes 28. A factor that depends on the
whole tree, such as a norm, needs another pass. XLA counts a slice inside a loop as its whole array.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import sophia_optax

Compiled = Any  # jax.stages.Compiled, whose analyses are typed as optional
Case = tuple[Any, dict[str, Any], bool]
"""(transformation, extra arguments, whether a sample of curvature is an input)."""
Row = dict[str, float | None]
RATE = 1e-3
INTERVAL = 10
MEAN = f"mean of {INTERVAL}"
ON = "refresh, statistics on"


def by_hand() -> optax.GradientTransformation:
    """Sophia between refreshes, written as one function, to compare the chain with."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):
        m = jax.tree.map(lambda g, m: 0.965 * m + 0.035 * g, updates, state[0])

        def step(m, h, p):
            ratio = jnp.clip(m / jnp.maximum(0.01 * h, 1e-12), -1, 1)
            return -RATE * (ratio + 1e-4 * p)

        return jax.tree.map(step, m, state[1], params), (m, state[1])

    return optax.GradientTransformation(init, update)


def baselines() -> dict[str, Case]:
    obj_fn = {"obj_fn": lambda p: sum(jnp.vdot(x, x) for x in jax.tree.leaves(p)) / 2}
    sophia = optax.contrib.sophia(RATE, update_interval=INTERVAL)
    return {
        "optax.sgd": (optax.sgd(RATE), {}, False),
        "optax.adamw": (optax.adamw(RATE), {}, False),
        "optax.lion": (optax.lion(RATE), {}, False),
        "optax.contrib.muon": (optax.contrib.muon(RATE), {}, False),
        f"optax.contrib.sophia, sampling included, {MEAN}": (sophia, obj_fn, False),
        "Sophia by hand, between refreshes": (by_hand(), {}, False),
    }


def sophias(dtype: str) -> dict[str, Case]:
    """Sophia-H and Sophia-G with states of `dtype`."""
    states: dict[str, Any] = {"mu_dtype": dtype, "hessian_dtype": dtype}
    plain, found = {"refresh": False}, {}
    for name, make in (("sophia_h", sophia_optax.sophia_h), ("sophia_g", sophia_optax.sophia_g)):
        found[f"{name}, between refreshes"] = (make(RATE, **states), plain, False)
        found[f"{name}, {ON}"] = (make(RATE, **states), {}, True)
    silent = sophia_optax.sophia_g(RATE, statistics=False, **states)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), sophia_optax.sophia_g(RATE, **states))
    itself = sophia_optax.sophia_g(RATE, estimator=sophia_optax.squared_gradient(), **states)
    return found | {
        "sophia_g, refresh, statistics off": (silent, {}, True),
        "sophia_g, clip by norm, between refreshes": (clipped, plain, False),
        f"sophia_g on g², refresh=None, {MEAN}": (itself, {}, False),
    }


def others(dtype: str) -> dict[str, Case]:
    """Optimizers whose curvature changes on every update."""
    states: dict[str, Any] = {"mu_dtype": dtype, "hessian_dtype": dtype}
    geometric = sophia_optax.sophia_geometric(RATE, **states)
    before = optax.chain(optax.clip_by_global_norm(1.0), geometric)
    within = sophia_optax.sophia_geometric(RATE, max_norm=1.0, **states)
    tadam = sophia_optax.soaa(RATE, 1000, rule="tadam", **states)
    return {
        "sophia_lite": (sophia_optax.sophia_lite(RATE, **states), {}, False),
        "sophia_geometric": (geometric, {}, False),
        "sophia_geometric, clip by norm before": (before, {}, False),
        "sophia_geometric, clip by norm within": (within, {}, False),
        "soaa": (sophia_optax.soaa(RATE, 1000, **states), {"value": 1.0}, False),
        "soaa, rule of tadam": (tadam, {"value": 1.0}, False),
        "orthosoph": (sophia_optax.orthosoph(RATE, mu_dtype=dtype), {}, False),
    }


def cases() -> dict[str, Case]:
    found = baselines()
    for dtype in ("float32", "bfloat16"):
        for name, case in (sophias(dtype) | others(dtype)).items():
            found[name + ", bfloat16" * (dtype == "bfloat16")] = case
    return found


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


def floor(program: Compiled) -> int:
    """Bytes of all inputs that are read, and of all outputs that are not inputs."""
    entry = program.as_text().split("\nENTRY ")[1]
    found = re.findall(r"(%[\w.-]+) = (\w+?)(\d*)\[([\d,]*)\]\S* ([\w-]+)\(", entry)
    size = {
        name: int(bits or 8) // 8 * int(np.prod([int(n) for n in shape.split(",") if n]))
        for name, _, bits, shape, _ in found
    }
    inputs = {name for name, *_, kind in found if kind == "parameter"}
    body, root = entry.split("ROOT ")
    used = {
        x for line in body.splitlines() for x in re.findall(r"%[\w.-]+", line.partition("(")[2])
    }
    outputs = re.findall(r"%[\w.-]+", root.partition(" tuple(")[2].partition(")")[0])
    return sum(size[x] for x in inputs & used) + sum(size[x] for x in outputs if x not in inputs)


def counted(program: Compiled, size: int) -> Row:
    cost, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "bytes_per_parameter": cost["bytes accessed"] / size,
        "floor": floor(program) / size,
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6,
        "flops_per_parameter": cost["flops"] / size,
    }


def seconds_of(program: Compiled, args: Any) -> Iterator[float]:
    """Yields the seconds of one update after another."""
    params, state, *rest = args
    del args
    while True:
        start = time.perf_counter()
        params, state = jax.block_until_ready(program(params, state, *rest))
        yield time.perf_counter() - start


def time_ratio(
    updates: Iterator[float], adamw: Iterator[float], rounds: int, limit: float, period: int
) -> float | None:
    """Median of the ratios of paired updates; with a period, their mean over whole periods."""
    start, ratios = time.perf_counter(), []
    for program in (updates, adamw):
        next(program)  # warm up
    while len(ratios) < rounds and (len(ratios) < 2 or time.perf_counter() - start < limit):
        ratios.append(next(updates) / next(adamw))
    if period == 1:
        return statistics.median(ratios)
    whole = len(ratios) // period * period
    return statistics.fmean(ratios[:whole]) if whole else None


def parameters(size: int, matrices: int = 8) -> dict[str, jax.Array]:
    columns = size // (matrices * 1024)
    keys = jax.random.split(jax.random.key(0), matrices)
    return {f"w{i}": jax.random.normal(k, (1024, columns)) for i, k in enumerate(keys)}


def measure(name: str, case: Case, size: int, rounds: int, limit: float) -> Row:
    """The figures of one update."""
    program, args = compile_update(*case, parameters(size))
    row = counted(program, optax.tree.size(args[0]))
    if rounds:
        adamw = seconds_of(*compile_update(*baselines()["optax.adamw"], parameters(size)))
        updates = seconds_of(program, args)
        del args  # donated
        period = INTERVAL if MEAN in name else 1
        row["time_over_adamw"] = time_ratio(updates, adamw, rounds, limit, period)
    return row


def average(between: Row, refresh: Row) -> Row:
    """Means of INTERVAL updates, one of them a refresh."""

    def mean(name, x, y):
        if name == "temporary_megabytes":
            return max(x, y)
        return None if x is None or y is None else ((INTERVAL - 1) * x + y) / INTERVAL

    return {name: mean(name, x, refresh[name]) for name, x in between.items()}


def run(size: int, rounds: int, limit: float = 20.0, only: str = "") -> dict[str, Row]:
    """Figures of each case whose name contains `only`; for Sophia also the mean of updates."""
    rows: dict[str, Row] = {}
    for name, case in cases().items():
        if only not in name:
            continue
        rows[name] = measure(name, case, size, rounds, limit)
        between = name.replace(ON, "between refreshes")
        if between != name and between in rows:
            mean = average(rows[between], rows[name])
            rows[name.replace(ON, MEAN)] = mean
    return rows


def show(rows: dict[str, Row], size: int) -> None:
    table = Table(title=f"one update of {size / 1e6:.1f} M float32 parameters")
    table.add_column("optimizer")
    columns = ("bytes", "floor", "bytes / floor", "temporaries (MB)", "FLOPs", "time / adamw")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        moved, least = row["bytes_per_parameter"], row["floor"]
        figures = [moved, least, moved and least and moved / least]
        figures += [row["temporary_megabytes"], row["flops_per_parameter"]]
        figures.append(row.get("time_over_adamw"))
        digits = (1, 1, 2, 1, 0, 2)
        text = ["" if x is None else f"{x:.{n}f}" for x, n in zip(figures, digits, strict=True)]
        table.add_row(name, *text)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"type": int, "nargs": "+", "default": [34_603_008]}
    parser.add_argument("--size", **sizes, help="numbers of parameters")
    parser.add_argument("--rounds", type=int, default=10, help="timed updates; 0 only counts")
    parser.add_argument("--limit", type=float, default=20.0, help="time limit of a row, in seconds")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    found = {}
    for size in args.size:
        found[size] = run(size, args.rounds, args.limit, args.only)
        show(found[size], size)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
