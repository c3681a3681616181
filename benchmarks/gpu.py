"""Updates and training steps on one GPU: `benchmarks/gpu.sh --json gpu.json`.

- Updates alone: their time relative to a copy of the bytes that they must read and write.
- Steps of a GPT-2 in bfloat16, with and without a sample of curvature: tokens per second, memory,
  and MFU. MFU uses `train.plan.flops.model_flops`, which does not count curvature.

Each measurement runs in a process of its own. So it has a memory peak of its own, and if it fails
the others still run. The file is written after each. `--small` tests the script.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import sophia_optax
from benchmarks.curvature_cost import SHARE, Sampler, gauss_newton, hutchinson, sampling_of
from benchmarks.update_cost import compile_update
from models import GPT2, DecoderConfig, split
from train.optimizers.base import Due
from train.plan.flops import model_flops, peak_flops
from train.step.batch import next_tokens
from train.step.loss import outputs_of
from train.step.train_step import init_state, make_step

RATE = 1e-4
INTERVAL = 10
SOPHIA = sophia_optax.sophia_g(RATE)
# (optimizer, extra arguments, whether a sample is an input, bytes per parameter). The bytes: p and
# the state are read and written, g and the sample are read. h is written only on refreshes.
# OrthoSoph's momentum is bfloat16.
UPDATES: dict[str, tuple[Any, dict[str, Any], bool, int]] = {
    "adamw": (optax.adamw(RATE), {}, False, 28),
    "sophia-g": (SOPHIA, {"refresh": False}, False, 24),
    "sophia-g, refresh": (SOPHIA, {"refresh": True}, True, 32),
    "orthosoph": (sophia_optax.orthosoph(RATE), {}, False, 16),
}
STEPS: dict[str, tuple[Sampler, bool]] = {
    "adamw": (Sampler(optax.adamw(RATE)), False),
    "sophia-g": (gauss_newton(SHARE), False),
    f"sophia-g, sample of 1/{SHARE}": (gauss_newton(SHARE), True),
    "sophia-g, sample of all rows": (gauss_newton(), True),
    f"sophia-h, sample of 1/{SHARE}": (hutchinson(SHARE), True),
    "orthosoph": (Sampler(sophia_optax.orthosoph(RATE)), False),
}
CASES = ("copy", *(f"update {name}" for name in UPDATES), *(f"step {name}" for name in STEPS))
Row = dict[str, Any]


class Size(NamedTuple):
    """What is measured, and how many times."""

    config: DecoderConfig
    rows: int
    copied: int  # float32 numbers
    calls: int  # calls per timing
    rounds: int  # timings, whose median is taken


def size_of(args: argparse.Namespace) -> Size:
    if args.small:
        return Size(dataclasses.replace(GPT2["tiny"], dtype="bfloat16"), SHARE, 2**20, 2, 2)
    config = dataclasses.replace(GPT2[args.model], dtype="bfloat16", attention=args.attention)
    return Size(config, args.rows, 2**28, 10, 7)


def seconds(call: Callable[[Any], Any], state: Any, size: Size) -> float:
    """Seconds of one call; each call gets what the last one returned."""
    times = []
    for _ in range(size.rounds + 1):
        start = time.perf_counter()
        for _ in range(size.calls):
            state = call(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / size.calls)
    return statistics.median(times[1:])


def copy(size: Size) -> Row:
    """Bytes per second of a copy, and the device."""
    x = jnp.ones(size.copied, jnp.float32)
    elapsed = seconds(jax.jit(lambda x: -x, donate_argnums=0), x, size)
    device = jax.devices()[0]
    where = {"platform": device.platform, "device": device.device_kind, "jax": jax.__version__}
    return where | {"seconds": elapsed, "bytes_per_second": 2 * 4 * size.copied / elapsed}


def update(name: str, size: Size) -> Row:
    tx, extra, sampled, bytes_per_parameter = UPDATES[name]
    params = jax.jit(split(size.config).init)(jax.random.key(0))
    number = optax.tree.size(params)
    program, (*state, grads, sample) = compile_update(tx, extra, sampled, params)
    del params  # the program donates them
    elapsed = seconds(lambda state: program(*state, grads, sample), state, size)
    return {"seconds": elapsed, "parameters": number, "bytes": number * bytes_per_parameter}


def step(name: str, size: Size) -> Row:
    (tx, estimator), refresh = STEPS[name]
    config = size.config
    model = split(config)
    twice_differentiable = outputs_of(split(dataclasses.replace(config, attention="xla")))
    outputs = outputs_of(model)
    sampling = sampling_of(estimator)
    one = make_step(outputs, tx, sampling=sampling, hessian_outputs=twice_differentiable)
    state = jax.jit(functools.partial(init_state, model.init, tx, 0))()
    shape = size.rows, config.context + 1
    batch = next_tokens(jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size))
    program = jax.jit(one, static_argnums=2, donate_argnums=0).lower(state, batch, Due(refresh))
    program = program.compile()
    memory = program.memory_analysis()
    row = {
        "seconds": seconds(lambda state: program(state, batch)[0], state, size),
        "tokens": size.rows * config.context,
        "flops": model_flops(config, size.rows, config.context),
    }
    if memory:
        row["program_bytes"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return row | ({"peak_bytes": peak} if peak else {})


def measure(case: str, size: Size) -> Row:
    """Figures of one measurement, or its error."""
    kind, _, name = case.partition(" ")
    try:
        return copy(size) if kind == "copy" else {"update": update, "step": step}[kind](name, size)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def in_own_process(case: str, argv: Sequence[str], timeout: float) -> Row:
    """Figures from a process that measures only this case, or how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.gpu", *argv, "--case", case, "--json", path]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"no result after {timeout:.0f} s; allow more with --timeout."}
        if path.exists():
            return json.loads(path.read_text())
        last = done.stderr.strip().splitlines()[-3:]
        return {"error": f"the process ended with {done.returncode}: " + " ".join(last)}


def complete(rows: dict[str, Row], peak: float | None) -> None:
    """Adds the figures that relate a row to other rows."""
    bandwidth = rows.get("copy", {}).get("bytes_per_second")
    plain = rows.get("step sophia-g", {}).get("seconds")
    for name, row in rows.items():
        elapsed = row.get("seconds")
        if elapsed and bandwidth and "bytes" in row:
            row["over_floor"] = elapsed * bandwidth / row["bytes"]
        if elapsed and "tokens" in row:
            row["tokens_per_second"] = row["tokens"] / elapsed
            if peak:
                row["mfu"] = row["flops"] / elapsed / peak
        if elapsed and plain and "sample" in name:
            row["overhead"] = (elapsed / plain - 1) / INTERVAL


def show(rows: dict[str, Row], console: Console) -> None:
    updates = Table(title="one update")
    steps = Table(title="one step; overhead if one step in ten samples curvature")
    for table, columns in (
        (updates, ("ms", "must move (MB)", "time / floor")),
        (steps, ("ms", "tokens / s", "MFU", "overhead", "peak (MB)", "program (MB)")),
    ):
        table.add_column("optimizer", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right")
    for case, row in rows.items():
        kind, _, name = case.partition(" ")
        if "error" in row:
            continue
        if kind == "update":
            updates.add_row(name, *cells(row, ("bytes",), ("over_floor", ".2f")))
        if kind == "step":
            keys = ("tokens_per_second", ",.0f"), ("mfu", ".1%"), ("overhead", ".1%")
            steps.add_row(name, *cells(row, *keys, ("peak_bytes",), ("program_bytes",)))
    console.print(updates, steps)


def cells(row: Row, *keys: tuple[str, ...]) -> list[str]:
    """Milliseconds, then one cell per figure: in its format, or in megabytes without one."""
    found = [f"{1e3 * row['seconds']:.3f}"]
    for key, *spec in keys:
        value = row.get(key)
        if value is None:
            found.append("")
        else:
            found.append(f"{value:{spec[0]}}" if spec else f"{value / 1e6:,.1f}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny model on any device")
    parser.add_argument("--model", choices=list(GPT2), default="gpt2-125m")
    parser.add_argument(
        "--rows", type=int, default=16, help=f"rows of a batch; a multiple of {SHARE}"
    )
    parser.add_argument("--attention", choices=["cudnn", "xla"], default="cudnn")
    parser.add_argument("--peak", type=float, help="peak bfloat16 TFLOP/s of the device, for MFU")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument(
        "--timeout", type=float, default=300, help="time limit of a measurement, in seconds"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # in its own process
    args = parser.parse_args(argv)
    if args.case:
        args.json.write_text(json.dumps(measure(args.case, size_of(args))))
    else:
        run(args, argv)


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    console = Console(width=105)
    rows: dict[str, Row] = {}
    for case in dict.fromkeys(("copy", *args.cases)):
        row = rows[case] = in_own_process(case, argv, args.timeout)
        if case == "copy":
            print_device(row, args, console)
        if "error" in row:
            console.print(f"{case} failed: {row['error']}", style="red", markup=False)
        complete(rows, peak_flops(rows["copy"].get("device", ""), args.peak))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows, console)
    if failed := sum("error" in row for row in rows.values()):
        raise SystemExit(f"{failed} of {len(rows)} measurements failed; see the messages above.")


def print_device(row: Row, args: argparse.Namespace, console: Console) -> None:
    if "error" in row:
        return
    if row["platform"] != "gpu" and not args.small:
        raise SystemExit(
            f"JAX found no GPU, only {row['device']}: install jax[cuda13], or pass --small."
        )
    config, rows, *_ = size_of(args)
    console.print(
        f"Ran on {row['device']} ({row['platform']}), jax {row['jax']}; a copy moves "
        f"{row['bytes_per_second'] / 1e9:.1f} GB/s. {rows} x {config.context} tokens, width "
        f"{config.width}, {config.layers} layers, {config.attention} attention."
        + " Sizes are small: the times are not meaningful."
        * args.small
    )
    if not peak_flops(row["device"], args.peak):
        console.print("No MFU: the peak of this device is unknown; pass it with --peak.")


if __name__ == "__main__":
    main()
