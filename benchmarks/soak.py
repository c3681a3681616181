"""Does a long run leak? `python -m benchmarks.soak` (20,000 tiny steps, about ten minutes).

Trains a very small model, with checkpoints and evaluations, and records memory, open files and step
time. Prints each with the slope of a least-squares line through the second half of the run, and
plots them. Memory is measured after the allocator has returned free pages. The standard error
assumes independent residuals, which is not quite true.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from models import DecoderConfig
from train import loop
from train.config.presets import preset
from train.config.schema import Config, OutputConfig

NAMES = {"memory": "resident memory (MB)", "files": "open files", "time": "time of a step (ms)"}


class Point(NamedTuple):
    """Measurements at one step."""

    step: int
    memory: float  # MB
    files: int
    time: float  # ms


class Line(NamedTuple):
    """A least-squares line."""

    slope: float  # per thousand steps
    error: float  # its standard error
    grew: bool  # slope over three errors, and growth in the run over a hundredth of the mean


class Probe:
    """A tracker that measures the process whenever it gets metrics."""

    def __init__(self, tokens: int):
        self.tokens, self.points = tokens, []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Measures the process. Metrics of evaluations have no step time and are ignored."""
        if "tokens_per_second" in metrics:
            with contextlib.suppress(OSError, AttributeError):  # only glibc has it
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            files = len(os.listdir("/proc/self/fd"))
            time = 1e3 * self.tokens / metrics["tokens_per_second"]
            self.points.append(Point(step, memory, files, time))

    def close(self) -> None:
        """Does nothing: no file is open."""


def config(steps: int, every: int, folder: str) -> Config:
    """A run of a model so small that the host does most of the work of a step."""
    shown = OutputConfig(
        folder=folder,
        log_every=every,
        checkpoint_every=5 * every,
        sample_length=0,
        quiet=True,
    )
    return dataclasses.replace(
        preset("tiny", "sophia-g"),
        model=DecoderConfig(vocab_size=256, context=32, width=16, layers=1, heads=2),
        output=shown,
        steps=steps,
        batch_size=8,
        sequence_length=32,
        warmup_steps=min(100, steps // 2),
        evaluate_every=max(steps // 4, 1),
    )


def soak(run: Config) -> list[Point]:
    """The points of a run, without the first: programs have just been loaded there."""
    probe = Probe(run.batch_size * run.sequence_length)
    loop.train(run, others=[probe])
    return probe.points[1:]


def fit(points: Sequence[Point], name: str) -> Line:
    """The line through the second half of the points."""
    half = points[len(points) // 2 :]
    x = np.array([p.step for p in half]) / 1000
    y = np.array([getattr(p, name) for p in half], float)
    if len(half) < 3:
        return Line(float("nan"), float("nan"), False)
    centred = x - x.mean()
    slope = centred @ y / (centred @ centred)
    rest = y - y.mean() - slope * centred
    error = float(np.sqrt(rest @ rest / (len(x) - 2) / (centred @ centred)))
    matters = slope * points[-1].step / 1000 > 0.01 * y.mean()
    return Line(float(slope), error, bool(slope > 3 * error and matters))


def draw(points: Sequence[Point], path: Path) -> None:
    """Plots each measurement over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    rows = figure.subplots(len(NAMES), sharex=True)
    for axes, (name, label) in zip(rows, NAMES.items(), strict=True):
        axes.plot([p.step for p in points], [getattr(p, name) for p in points], linewidth=1)
        axes.set(ylabel=label, ylim=(0, None))
    figure.axes[-1].set_xlabel("step")
    figure.savefig(path)


def table(points: Sequence[Point]) -> Table:
    """Each measurement at the start and at the end, and its growth."""
    shown = Table("", "first", "last", "slope per 1000 steps", "growth")
    for name, label in NAMES.items():
        line = fit(points, name)
        ends = (f"{getattr(points[i], name):.4g}" for i in (0, -1))
        shown.add_row(
            label, *ends, f"{line.slope:.2g} ± {line.error:.1g}", "yes" if line.grew else "no"
        )
    return shown


def main(args: Sequence[str] | None = None) -> None:
    """Trains, prints and plots."""
    parser = argparse.ArgumentParser(description="Does a long run leak?")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=200, help="steps between points")
    parser.add_argument("--plot", type=Path, default=Path("runs/soak.png"))
    given = parser.parse_args(args)
    if given.steps // given.every < 4:
        parser.error("--steps must be at least four times --every")
    with tempfile.TemporaryDirectory() as folder:
        points = soak(config(given.steps, given.every, f"{folder}/run"))
    given.plot.parent.mkdir(parents=True, exist_ok=True)
    draw(points, given.plot)
    console = Console()
    console.print(table(points))
    console.print(f"{given.steps} steps; plotted in {given.plot}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
