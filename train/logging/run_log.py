"""What a run reports: `metrics.jsonl` for programs, a progress line for people, a figure."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from models import reading
from train import files
from train.logging.trackers import Writer

FILE = "metrics.jsonl"
_PLAIN_SECONDS = 10.0  # between lines where there is no terminal to draw a bar on


class JsonLines:
    """Appends to `folder/metrics.jsonl`; what it holds after step `start` is dropped first.

    Args:
        folder: exists.
        start: steps already done; 0 begins the file anew.
    """

    def __init__(self, folder: Path, start: int = 0):
        self._path = folder / FILE
        rows = _rows(self._path) if start and self._path.exists() else []
        self.kept = [row for row in rows if row["step"] <= start]
        with self._explain():
            lines = "".join(json.dumps(row) + "\n" for row in self.kept)
            files.replace_text(self._path, lines)
            self._file = self._path.open("a", buffering=1)  # a killed run loses no whole line

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; what is not finite becomes null."""
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        with self._explain():
            self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def sync(self) -> None:
        """Returns when the lines are on the disk: a checkpoint must not be ahead of them."""
        with self._explain():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is written after it."""
        with self._explain():
            self._file.close()

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: metrics cannot be written, check free space and permissions",
                str(self._path),
            ) from error


class RunLog:
    """Writes the metrics of a run to `folder/metrics.jsonl` and shows its progress.

    A context manager. Entering it drops what the file holds after `start_step`: those steps are
    about to be run again. Without a terminal it prints a line every ten seconds, not a bar.

    Args:
        folder: made if it is missing.
        total_steps: where the bar ends.
        start_step: steps already done; 0 begins the file anew.
        quiet: show nothing.
        console: where to show; default standard output.
        writers: others that take the metrics; they are closed with it.
        silent: write nothing either, since another process does.
    """

    def __init__(
        self,
        folder: str | Path,
        total_steps: int,
        start_step: int = 0,
        *,
        quiet: bool = False,
        console: Console | None = None,
        writers: Sequence[Writer] = (),
        silent: bool = False,
    ):
        self._folder, self._silent = Path(folder), silent
        self._total, self._start = total_steps, start_step
        self._others: list[Writer] = list(writers)
        self._lines: JsonLines | None = None
        quiet = quiet or silent
        self._console = Console(quiet=True) if quiet else console or Console()
        self._bar = self._console.is_terminal and not quiet
        self._progress = _progress(self._console, shown=self._bar)
        self._task = self._progress.add_task(
            self._folder.name, total=total_steps, completed=start_step, loss="", rate=""
        )
        self._next_line = 0.0  # on the clock: the first step always has one

    def __enter__(self) -> "RunLog":
        if not self._silent:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(self._folder, self._start)
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        with contextlib.ExitStack() as stack:  # all are closed, whichever fails
            for writer in self._writers:
                stack.callback(writer.close)

    @property
    def kept(self) -> list[dict[str, Any]]:
        """Rows of the steps that were done before, of this process's file."""
        return self._lines.kept if self._lines else []

    @property
    def _writers(self) -> list[Writer]:
        return ([self._lines] if self._lines else []) + self._others

    def sync(self) -> None:
        """Returns when all that was recorded is on the disk."""
        if self._lines:
            self._lines.sync()

    @contextlib.contextmanager
    def compiling(self, name: str) -> Iterator[None]:
        """Show that a program is being compiled, and then how long it took."""
        self._progress.update(self._task, loss=f"compiling the {name}")
        if not self._bar:
            self.print(f"compiling the {name}")
        start = time.perf_counter()
        yield
        self._progress.update(self._task, loss="")
        self.print(f"compiled the {name} in {time.perf_counter() - start:.1f} s")

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one training step: `loss`, `tokens_per_second`, and whatever else there is.

        `mfu` is the share of the peak of chips that `train.plan.flops` knows.
        """
        self._write(step, metrics)
        loss = f"loss {metrics.get('loss', math.nan):.3f}"
        rate = f"{_short(metrics.get('tokens_per_second', math.nan))} tokens/s"
        rate += f"  {metrics['mfu']:.0%} MFU" if "mfu" in metrics else ""
        self._progress.update(self._task, completed=step, loss=loss, rate=rate)
        if not self._bar and (time.monotonic() >= self._next_line or step >= self._total):
            self._next_line = time.monotonic() + _PLAIN_SECONDS
            self.print(f"step {step}/{self._total}  {loss}  {rate}{self._time_left()}")

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one evaluation, `heldout_loss` and the like, and print it."""
        self._write(step, metrics)
        values = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
        self.print(f"step {step}/{self._total}  {'  '.join(values)}")

    def print(self, *objects: Any) -> None:
        """Print above the bar, as it is: square brackets and colons in a sample are no markup."""
        self._console.print(*objects, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        for writer in self._writers:
            writer.write(int(step), values)

    def _time_left(self) -> str:
        seconds = self._progress.tasks[0].time_remaining
        return f"  {timedelta(seconds=round(seconds))} left" if seconds else ""


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl`, in the order of the file; null becomes NaN.

    A last line that was torn by a kill is left out.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a line is not a row; of the last one only if it is JSON.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the folder of a run that has started")
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in _rows(path)]


def plot(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    reference: tuple[Sequence[tuple[int, float]], str] | None = None,
    unit: str = "byte",
) -> None:
    """Draw the loss curves of a run as a PNG, in nats on the left and bits on the right.

    Args:
        history: rows of `read_history`: `loss` is training, `heldout_loss` held-out, in nats.
        path: where to write; its folder exists.
        title: above the figure.
        reference: ([(step, held-out loss)], label) of another run.
        unit: what a token is.
    """
    # Imported late: it takes half a second. A Figure of its own leaves pyplot's state alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    train, heldout = _curve(history, "loss"), _curve(history, "heldout_loss")
    points, name = reference or ([], "")
    other = np.array(points, float).reshape(-1, 2).T
    axes.plot(*train, color="#9ecae1", linewidth=0.6)
    axes.plot(train[0], _smooth(train[1]), color="#1f6fb4", linewidth=1.8, label="training, mean")
    if reference is not None:
        axes.plot(*other, "--", color="#777777", linewidth=1.4, label=_label(name, other))
    label = _label("held-out", heldout)
    axes.plot(*heldout, "o-", color="#d9480f", markersize=4, linewidth=1.2, label=label)
    _decorate(axes, title, unit, np.concatenate([train, heldout, other], axis=1))
    files.replace(Path(path), figure.savefig)


def _decorate(axes: Any, title: str, unit: str, points: np.ndarray) -> None:
    axes.set_title(title, loc="left", fontweight="bold", pad=10)
    axes.set(xlabel="step", ylabel=f"loss (nats per {unit})")
    bit = math.log(2)
    bits = axes.secondary_yaxis("right", functions=(lambda x: x / bit, lambda x: x * bit))
    bits.set_ylabel(f"bits per {unit}", labelpad=8)
    for side in (axes.spines["top"], axes.spines["right"], bits.spines["right"]):
        side.set_visible(False)
    axes.tick_params(length=3)
    bits.tick_params(length=0)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    if points.size:
        # The first steps fall from ln(vocabulary): kept in view, the rest of the run is flat.
        low, high = points[1].min(), np.quantile(points[1], 0.98)
        margin = 0.05 * (high - low) + 0.01
        axes.set(xlim=(0, 1.02 * points[0].max() + 1), ylim=(low - margin, high + margin))


def _label(name: str, curve: np.ndarray) -> str:
    return f"{name}: {curve[1, -1]:.3f} at the end" if curve.size else name


def _curve(history: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Float64 [2, points]: steps and finite values of one metric."""
    points = [(row["step"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
    return np.array(sorted(points), float).reshape(-1, 2).T


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the run; at the ends, over what there is of it."""
    if len(values) < 3:
        return values
    window = np.hanning(2 * (len(values) // 40) + 5)[1:-1]
    weights = np.convolve(np.ones_like(values), window, "same")
    return np.convolve(values, window, "same") / weights


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that was torn is left out."""
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = reading.parse_json(line, where)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{where} is not JSON: delete the line") from error
            continue
        if not _is_row(row):
            raise ValueError(f"{where} is not a step with its metrics: delete the line")
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """An object with a step, all else a number or null."""
    if not isinstance(row, dict) or any(isinstance(v, str | list | dict) for v in row.values()):
        return False
    return isinstance(row.get("step"), int) and row["step"] >= 0


def _progress(console: Console, *, shown: bool) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
        refresh_per_second=4,
    )


def _short(number: float) -> str:
    """Three digits and a suffix: 48.2k.

    >>> _short(999.0), _short(48_213.0), _short(1.25e6)
    ('999', '48.2k', '1.25M')
    """
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"
