"""How costs grow: `python -m benchmarks.scaling` (four minutes on two cores, 8 GB of memory).

- The time of an update should be linear in the number of parameters. The exponent is the slope of
  log time over log number.
- Weak scaling: the batch grows with the devices and the model stays fixed, so the operations, bytes
  and collectives of one device should stay constant. With fsdp, a device's share of update and
  state falls. The figures are XLA's for steps on 1 to 8 fake CPU devices, which are compiled but
  never run. Bytes of collectives are the bytes of their results, per device.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import sophia_optax
from benchmarks.curvature_cost import flops
from benchmarks.update_cost import compile_update, parameters
from models import DecoderConfig
from train.config.schema import Config
from train.optimizers.base import Due
from train.optimizers.sophia import SophiaG
from train.parallel import xla_flags
from train.parallel.mesh import MeshConfig
from train.plan.hlo import collectives
from train.program import assemble

OPTIMIZERS = {  # extra arguments, whether a sample of curvature is an input
    "optax.adamw": (optax.adamw(1e-3), {}, False),
    "sophia_g, between refreshes": (sophia_optax.sophia_g(1e-3), {"refresh": False}, False),
    "sophia_g, refresh": (sophia_optax.sophia_g(1e-3), {"refresh": True}, True),
}
SIZES = (1e5, 1e6, 1e7, 1e8)
CACHED = 9e6  # parameters; more than a cache holds
DEVICES = (1, 2, 4, 8)
MODEL = DecoderConfig(vocab_size=256, context=128, width=128, layers=4, heads=2)
ROWS = 8  # per device
STEPS = {  # fraction of rows that a sample uses, whether the step samples
    "plain": (1.0, False),
    "sample of all rows": (1.0, True),
    f"sample of 1/{ROWS}": (1 / ROWS, True),
}
MESHES = {
    "data": lambda devices: MeshConfig(data=devices),
    "fsdp": lambda devices: MeshConfig(data=1, fsdp=devices),
}
Figures = dict[str, dict[str, float]]


def update_times(name: str, sizes: Sequence[float], rounds: int) -> Figures:
    """Median seconds of an update at each size."""
    tx, extra, sampled = OPTIMIZERS[name]
    figures = {}
    for size in sizes:
        params = parameters(int(size))
        number = optax.tree.size(params)
        program, args = compile_update(tx, extra, sampled, params)
        del params  # the program donates them
        calls = max(1, int(1e7 / number))  # small updates are repeated, for the clock's resolution
        seconds = _seconds(program, args, rounds, calls)
        figures[str(number)] = {"seconds": seconds, "nanoseconds": 1e9 * seconds / number}
    return figures


def _seconds(program: Any, args: Any, rounds: int, calls: int) -> float:
    (*state, grads, sample), times = args, []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(calls):
            state = program(*state, grads, sample)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[1:])


def exponent(figures: Figures, least: float = 0) -> float | None:
    """Slope of log seconds over log number, from `least` parameters on; None if it is undefined."""
    points = [(float(n), row["seconds"]) for n, row in figures.items() if float(n) >= least]
    if len(points) < 2:
        return None
    number, seconds = np.log(points).T
    return float(np.polyfit(number, seconds, 1)[0])


def compile_step(mesh: MeshConfig, devices: int, fraction: float, refresh: bool) -> Any:
    """The trainer's step with `ROWS` rows per device."""
    run = Config(
        model=MODEL,
        optim=SophiaG(batch_fraction=fraction),
        mesh=mesh,
        batch_size=ROWS * devices,
        sequence_length=MODEL.context,
    )
    program = assemble(run, jax.devices("cpu")[:devices])
    lowered = program.step.lower(program.abstract, program.batch(0), due=Due(refresh))
    return lowered.compile(compiler_options=xla_flags.known(xla_flags.QUICK))


def weak_scaling(devices: Sequence[int]) -> Figures:
    """Figures of one device, for each kind of mesh, program and number of devices."""
    figures = {}
    for layout, mesh in MESHES.items():
        for name, step in STEPS.items():
            for number in devices:
                program = compile_step(mesh(number), number, *step)
                memory = program.memory_analysis()
                talk = collectives(program.as_text())
                figures[f"{layout}, {name}, {number}"] = {
                    "flops": flops(program),
                    "bytes": program.cost_analysis()["bytes accessed"],
                    "temporary_bytes": memory.temp_size_in_bytes,
                    "argument_bytes": memory.argument_size_in_bytes,
                    "collectives": sum(count for count, _ in talk.values()),
                    "collective_bytes": sum(size for _, size in talk.values()),
                } | {kind: count for kind, (count, _) in talk.items()}
    return figures


def show_times(figures: dict[str, Figures]) -> None:
    table = Table(title="one update: seconds, and nanoseconds per parameter")
    table.add_column("float32 parameters", justify="right")
    for name in figures:
        table.add_column(name, justify="right")
    for number in next(iter(figures.values())):
        cells = (rows[number] for rows in figures.values())
        table.add_row(
            f"{int(number):,}", *(f"{x['seconds']:.5f}  {x['nanoseconds']:.2f}" for x in cells)
        )
    for label, least in (("exponent, all", 0), (f"exponent, from {CACHED:.0e} on", CACHED)):
        slopes = [exponent(rows, least) for rows in figures.values()]
        if None not in slopes:
            table.add_row(label, *(f"{slope:.3f}" for slope in slopes))
    Console(width=105).print(table)


def show_scaling(figures: Figures) -> None:
    table = Table(title=f"one device in a step with {ROWS} x {MODEL.context} tokens per device")
    table.add_column("mesh, step, devices", no_wrap=True)
    columns = ("GFLOP", "MB moved", "MB state", "MB temporaries", "collectives", "their MB")
    for column in columns:
        table.add_column(column, justify="right")
    keys = ("bytes", "argument_bytes", "temporary_bytes")
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['flops'] / 1e9:.3f}",
            *(f"{row[key] / 1e6:.1f}" for key in keys),
            f"{row['collectives']}",
            f"{row['collective_bytes'] / 1e6:.2f}",
        )
    Console(width=105).print(table)


def fake_devices() -> None:
    """Makes fake devices; call it before jax looks for devices."""
    jax.config.update("jax_num_cpu_devices", max(DEVICES))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--largest", type=float, default=3e8, help="largest number of parameters, of 24 bytes each"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument(
        "--devices", type=int, nargs="*", default=DEVICES, help="numbers of fake devices, up to 8"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    fake_devices()
    sizes = [*(size for size in SIZES if size < args.largest), args.largest]
    times = {name: update_times(name, sizes, args.rounds) for name in OPTIMIZERS}
    show_times(times)
    scaling = weak_scaling(args.devices)
    show_scaling(scaling)
    if args.json:
        result = {"update_times": times, "weak_scaling": scaling}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
