"""Losses do not depend on where and how a step is computed: `python -m benchmarks.mesh_equality`.

The script compares the first ten losses of each optimizer with the losses on one device with
unrolled layers, no remat and one micro-batch. It varies the mesh (four meshes of 8 fake CPU
devices, and one device), scanned layers, remat, and the number of micro-batches (1 or 4), and
prints the largest relative difference of each combination. It takes about an hour on two cores,
nearly all of it compilation. `--quick` tries one combination per mesh, and `--processes` two
processes of four devices each; these take minutes.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

if __name__ == "__main__":  # XLA reads its flags when jax starts
    from train.parallel import xla_flags

    DEVICES = 8 // int(os.environ.get("NUM_PROCESSES", 1))
    xla_flags.add(
        {"xla_force_host_platform_device_count": DEVICES, "xla_backend_optimization_level": 0}
        | xla_flags.PATIENT
    )

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models import DecoderConfig
from models.config import RematName
from train import program
from train.config.presets import preset
from train.config.schema import Config
from train.optimizers.base import Due
from train.parallel import processes as distributed
from train.parallel.mesh import MeshConfig

OPTIMIZERS = ("sophia-g", "sophia-h", "orthosoph", "soaa", "adamw")
MODEL = DecoderConfig(vocab_size=256, context=16, width=32, layers=2, heads=8)
STEPS, SAMPLE_EVERY = 10, 3


class Form(NamedTuple):
    """How a step is computed."""

    mesh: tuple[int, int, int] = (1, 1, 1)  # data, fsdp, tensor
    scan: bool = False
    remat: RematName = "none"
    accumulation: int = 1


MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8), (1, 1, 1))
PROCESSES = 2
SHARED = (Form((2, 4, 1)), Form((2, 4, 1), True, "full", 4), Form((1, 8, 1)), Form((2, 2, 2)))


def config(optimizer: str, form: Form) -> Config:
    """A run small enough to take a second."""
    return dataclasses.replace(
        preset("tiny", optimizer),
        model=dataclasses.replace(MODEL, scan_layers=form.scan, remat=form.remat),
        mesh=MeshConfig(*form.mesh),
        batch_size=32,
        sequence_length=MODEL.context,
        accumulation=form.accumulation,
        warmup_steps=2,
    )


def losses(optimizer: str, form: Form) -> np.ndarray:
    """Losses of the first ten steps; steps 0, 3, 6 and 9 sample curvature."""
    devices = jax.devices()[: math.prod(form.mesh)]
    programs = program.assemble(config(optimizer, form), devices)
    state, seen = programs.init(), []
    for step in range(STEPS):
        due = Due(refresh=step % SAMPLE_EVERY == 0)
        state, metrics = programs.step(state, programs.batch(step), due=due)
        seen.append(float(metrics["loss"]))
    return np.array(seen)


@functools.cache
def reference(optimizer: str) -> np.ndarray:
    """Losses on one device with unrolled layers, no remat and one micro-batch."""
    return losses(optimizer, Form())


def difference(optimizer: str, form: Form) -> float:
    """The largest relative difference between the ten losses and the reference."""
    return float(np.max(np.abs(losses(optimizer, form) / reference(optimizer) - 1)))


def forms(quick: bool) -> Iterator[Form]:
    """Every form except the reference; if `quick`, the one per mesh that differs most from it."""
    every = itertools.product(MESHES, (False, True), ("none", "full"), (1, 4))
    for form in itertools.starmap(Form, every):
        if form != Form() and (not quick or form[1:] == (True, "full", 4)):
            yield form


def one_of_several(names: Sequence[str]) -> None:
    """Runs in each process. The first prints losses [form, optimizer, step]."""
    with distributed.leaving():
        distributed.start(distributed.DistributedConfig())
        found = [[losses(name, form).tolist() for name in names] for form in SHARED]
        if distributed.is_main():
            print(json.dumps(found))


def free_port() -> int:
    """A free port of this machine, for its processes to connect."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def several(names: Sequence[str]) -> np.ndarray:
    """Losses [form, optimizer, step] of `SHARED`, from processes that share the devices."""
    own = {"COORDINATOR_ADDRESS": f"localhost:{free_port()}", "NUM_PROCESSES": str(PROCESSES)}
    command = [sys.executable, "-m", "benchmarks.mesh_equality", "--only", ",".join(names)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | own | {"PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(PROCESSES)
    ]
    outs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a process failed, exit codes {[p.returncode for p in started]}")
    return np.array(json.loads(outs[0].splitlines()[-1]))


def row(form: Form, differences: Sequence[float]) -> list[str]:
    """One row of the table."""
    shape = " x ".join(map(str, form.mesh))
    layers = "scanned" if form.scan else "unrolled"
    return [shape, layers, form.remat, str(form.accumulation), *(f"{x:.1e}" for x in differences)]


def rows(names: Sequence[str], *, quick: bool, processes: bool) -> Iterator[list[str]]:
    """Rows of the table: a form and the differences of each optimizer."""
    if processes:
        for form, found in zip(SHARED, several(names), strict=True):
            alone = [reference(name) for name in names]
            yield row(form, np.max(np.abs(found / alone - 1), axis=-1))
        return
    for form in track(list(forms(quick)), "compiling"):
        yield row(form, [difference(name, form) for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one combination per mesh")
    parser.add_argument("--processes", action="store_true", help="two processes of four devices")
    parser.add_argument(
        "--only", default=",".join(OPTIMIZERS), help="optimizers, separated by commas"
    )
    args = parser.parse_args()
    names = args.only.split(",")
    if "NUM_PROCESSES" in os.environ:
        return one_of_several(names)
    table = Table(title="largest relative difference of the first ten losses")
    for column in ("data x fsdp x tensor", "layers", "remat", "micro-batches", *names):
        table.add_column(column)
    for cells in rows(names, quick=args.quick, processes=args.processes):
        table.add_row(*cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
