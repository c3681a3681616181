"""Traces some steps with the profiler of JAX."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


def parse(steps: str) -> tuple[int, int] | None:
    """(first, last) step of "first:last"; None for the empty string.

    Raises:
      ValueError: it has another form.

    >>> parse("10:15")
    (10, 15)
    """
    if not steps:
        return None
    first, _, last = steps.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"output.profile={steps!r} names no steps: write FIRST:LAST, such as 10:15, from 1 on."
        )
    return int(first), int(last)


@contextlib.contextmanager
def profiler(
    steps: str, folder: Path, notify: Callable[[str], object]
) -> Iterator[Callable[[int, Any], None]]:
    """A function to call after each step, with its number and an array that it made.

    Args:
      steps: as in `parse`; empty traces nothing.
      folder: that the trace is written to.
      notify: called with a message that says where the trace is and how to open it.
    """
    window, running = parse(steps), False

    def finish() -> None:
        nonlocal running
        jax.profiler.stop_trace()
        running = False
        notify(
            f"profile of steps {steps}: {folder}; to look at it: pip install xprof, then "
            f"xprof --logdir {folder}"
        )

    def after(step: int, made: Any) -> None:
        nonlocal running
        if window and not running and step == window[0] - 1:
            jax.block_until_ready(made)
            jax.profiler.start_trace(str(folder))
            running = True
        if running and window and step >= window[1]:
            jax.block_until_ready(made)
            finish()

    try:
        yield after
    finally:
        if running:
            finish()
