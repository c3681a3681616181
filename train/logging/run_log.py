"""The log of a run: `metrics.jsonl` for programs, progress for people, and trackers."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from train.logging import progress
from train.logging.jsonl import JsonLines
from train.logging.trackers import Tracker

_PLAIN_SECONDS = 10.0  # between lines if there is no terminal for a bar


class RunLog:
    """Writes the metrics of a run to `folder/metrics.jsonl` and shows its progress.

    A context manager. Entering it drops the rows after `start_step`: those steps are about to run
    again. Without a terminal it prints a line every ten seconds instead of a bar.

    Args:
        folder: made if it is missing.
        total_steps: length of the bar.
        start_step: steps already done; 0 begins the file anew.
        quiet: show nothing.
        console: to print to; default standard output.
        writers: trackers that get the metrics too; they are closed with it.
        silent: show and write nothing, because another process does.
    """

    def __init__(
        self,
        folder: str | Path,
        total_steps: int,
        start_step: int = 0,
        *,
        quiet: bool = False,
        console: Console | None = None,
        writers: Sequence[Tracker] = (),
        silent: bool = False,
    ):
        self._folder, self._silent = Path(folder), silent
        self._total, self._start = total_steps, start_step
        self._others: list[Tracker] = list(writers)
        self._lines: JsonLines | None = None
        quiet = quiet or silent
        self._console = Console(quiet=True) if quiet else console or Console()
        self._bar = self._console.is_terminal and not quiet
        self._progress = progress.bar(self._console, shown=self._bar)
        self._task = self._progress.add_task(
            self._folder.name, total=total_steps, completed=start_step, loss="", rate=""
        )
        self._next_line = 0.0  # time of the clock; the first step always prints one

    def __enter__(self) -> "RunLog":
        if not self._silent:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(self._folder, self._start)
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        with contextlib.ExitStack() as stack:  # all are closed even if one fails
            for writer in self._writers:
                stack.callback(writer.close)

    @property
    def kept(self) -> list[dict[str, Any]]:
        """Rows of the earlier steps of a resumed run; empty on a silent process."""
        return self._lines.kept if self._lines else []

    @property
    def _writers(self) -> list[Tracker]:
        return ([self._lines] if self._lines else []) + self._others

    def sync(self) -> None:
        """Waits until all recorded rows are on the disk."""
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
        """Record one training step: `loss`, `tokens_per_second`, and any other metrics.

        `mfu` is the share of the chips' peak, for chips that `train.plan.flops` knows.
        """
        self._write(step, metrics)
        loss = f"loss {metrics.get('loss', math.nan):.3f}"
        rate = f"{progress.short(metrics.get('tokens_per_second', math.nan))} tokens/s"
        rate += f"  {metrics['mfu']:.0%} MFU" if "mfu" in metrics else ""
        self._progress.update(self._task, completed=step, loss=loss, rate=rate)
        if not self._bar and (time.monotonic() >= self._next_line or step >= self._total):
            self._next_line = time.monotonic() + _PLAIN_SECONDS
            self.print(f"step {step}/{self._total}  {loss}  {rate}{self._time_left()}")

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record and print one evaluation, such as `heldout_loss`."""
        self._write(step, metrics)
        values = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
        self.print(f"step {step}/{self._total}  {'  '.join(values)}")

    def print(self, *objects: Any) -> None:
        """Print above the bar, without markup: a sample may have square brackets and colons."""
        self._console.print(*objects, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        for writer in self._writers:
            writer.write(int(step), values)

    def _time_left(self) -> str:
        seconds = self._progress.tasks[0].time_remaining
        return f"  {timedelta(seconds=round(seconds))} left" if seconds else ""
