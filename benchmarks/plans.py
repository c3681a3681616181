"""Requirements of six models on 8, 64 and 256 devices: `python -m benchmarks.plans` (minutes).

The runs use Sophia-G in bfloat16 with cuDNN attention, scanned layers and full remat, and shard
parameters over all devices. A step has 512 sequences of 1024 tokens (Llama-2: 256 of 4096), of
which one per device is sampled, and at least 64. Figures are computed by formula from shapes;
`python -m train plan` shows more of each run.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Table

from train.config.presets import preset
from train.config.schema import Config
from train.parallel.mesh import MeshConfig
from train.plan.plan import Plan, fake_devices, plan

MODELS = ("gpt2-125m", "gpt2-355m", "gpt2-540m", "gpt2-770m", "qwen3-0.6b", "llama2-7b")
DEVICES = (8, 64, 256)
LEAST = 64  # sampled sequences, at least


def config(model: str, devices: int) -> Config:
    """A run for this number of devices."""
    run = preset(model, "sophia-g")
    large = model == "llama2-7b"
    rows, length = (256, 4096) if large else (512, 1024)
    shape = dataclasses.replace(run.model, remat="full", attention="cudnn", dtype="bfloat16")
    optim = dataclasses.replace(run.optim, batch_fraction=max(LEAST, devices) / rows, groups=0)
    return dataclasses.replace(
        run,
        model=shape,
        precision="bfloat16",
        optim=optim,
        mesh=MeshConfig(fsdp=math.gcd(devices, run.model.width)),
        batch_size=rows,
        sequence_length=length,
    )


def row(figures: Plan) -> list[str]:
    """One row of the table."""
    plain, sampled = figures.steps["plain"], figures.steps["curvature"]
    exchanged = (sum(x.bytes for x in step.collectives.values()) for step in (plain, sampled))
    kept = plain.memory.parameters + plain.memory.optimizer
    return [
        figures.config.base,
        str(figures.devices),
        f"{figures.parameters / 1e6:,.1f}",
        f"{kept / 1e9:.2f}",
        f"{plain.memory.total / 1e9:.1f}, {sampled.memory.total / 1e9:.1f}",
        f"{plain.flops / 1e12:,.1f}, {sampled.flops / 1e12:,.1f}",
        ", ".join(f"{size / 1e9:.1f}" for size in exchanged),
        f"{figures.curvature:.1%}",
    ]


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help="presets (six)")
    parser.add_argument("--devices", type=int, nargs="*", default=DEVICES)
    known = parser.parse_args(args)
    fake_devices(max(known.devices))
    table = Table(title="per device: plain step, step that samples curvature")
    heads = ("model", "devices", "million parameters", "GB kept", "GB in all", "TFLOP")
    for name in (*heads, "GB exchanged", "curvature"):
        table.add_column(name, justify="right")
    cases = [(model, number) for model in known.models for number in known.devices]
    for model, number in track(cases, "planning"):
        table.add_row(*row(plan(config(model, number), devices=number)))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
