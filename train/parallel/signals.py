"""SIGINT and SIGTERM: the first asks a run to stop, the second ends the process at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run was told to stop and has saved its state. It also ends a loop over runs."""

    def __init__(self, folder: Path, step: int):
        super().__init__(f"stopped at step {step}, which is saved in {folder}")
        self.folder, self.step = folder, step


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that the first signal sets, so that the run stops between two steps.

    The second signal has the system's default action: it ends the process even inside a
    computation. Outside the main thread, Python cannot handle signals, and the event stays unset.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        stop.set()
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    old = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
