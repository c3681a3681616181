"""The cost of an update of one weight matrix: `python -m benchmarks.matrix_cost` (seconds).

XLA's count, on CPU, of the operations and bytes of a compiled update without a model. Loops are
unrolled, because XLA counts the body of a loop once.
"""

import argparse
import contextlib
import json
import unittest.mock
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import sophia_optax
from benchmarks.update_cost import compile_update

SHAPES = ((768, 768), (768, 3072), (50304, 768))
RATE = 1e-3
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "optax.adamw": (optax.adamw(RATE), {}),
    "optax.contrib.muon": (optax.contrib.muon(RATE), {}),
    "orthosoph": (sophia_optax.orthosoph(RATE), {}),
    "orthosoph, whole matrices": (sophia_optax.orthosoph(RATE, block_size=768), {}),
    "sophia_g, between refreshes": (sophia_optax.sophia_g(RATE), {"refresh": False}),
}


def unrolled_loops() -> contextlib.AbstractContextManager[Any]:
    """`jax.lax.fori_loop` as a Python loop."""

    def loop(lower, upper, body, carry, **unused):
        for i in range(lower, upper):
            carry = body(i, carry)
        return carry

    return unittest.mock.patch.object(jax.lax, "fori_loop", loop)


def measure(name: str, shape: tuple[int, int]) -> dict[str, float]:
    """Billions of operations, and bytes moved and state per parameter, of one update."""
    tx, extra = OPTIMIZERS[name]
    params = {"w": jnp.ones(shape, jnp.float32)}
    with unrolled_loops():
        program, args = compile_update(tx, extra, False, params)
    cost, size = program.cost_analysis(), optax.tree.size(params)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[1]))
    return {
        "gigaflops": cost["flops"] / 1e9,
        "bytes": cost["bytes accessed"] / size,
        "state": state / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    rows = {f"{n} {s[0]} x {s[1]}": measure(n, s) for s in SHAPES for n in OPTIMIZERS}
    table = Table("optimizer and matrix", "GFLOP", "bytes / parameter", "state / parameter")
    for name, row in rows.items():
        table.add_row(name, f"{row['gigaflops']:.3f}", f"{row['bytes']:.0f}", f"{row['state']:.2f}")
    Console(width=100).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
