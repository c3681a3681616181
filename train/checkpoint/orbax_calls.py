"""How Orbax is called: under which name, with which paths, and without its noise."""

import contextlib
import gc
import importlib
import logging
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_SPECIAL = re.compile(r"[][*?\\]")
_NOISY = ("absl", "asyncio", "root")


def module() -> Any:
    """Imported late, since it takes half a second; under its stable name where it has one."""
    try:
        return importlib.import_module("orbax.checkpoint.v1")
    except ModuleNotFoundError:
        return importlib.import_module("orbax.checkpoint.experimental.v1")


def plain(folder: Path, stack: contextlib.ExitStack) -> Path:
    r"""The folder under a path that means itself: a link in a temporary folder if need be.

    Orbax joins the path to patterns of `glob`, where [, * and ? have a meaning, and TensorStore
    takes \ for /: what was saved under such a path could not be read.

    Args:
      folder: exists.
      stack: removes the link when it is closed.

    Raises:
      ValueError: the path of temporary files has such characters too.
    """
    if not _SPECIAL.search(str(folder)):
        return folder
    place = stack.enter_context(tempfile.TemporaryDirectory(prefix="checkpoints-"))
    if _SPECIAL.search(place):
        raise ValueError(
            f"neither {folder} nor the temporary folder {place} is free of the characters [ ] * ? "
            "\\: set TMPDIR to a folder without them, or choose another --output.folder."
        )
    link = Path(place) / "checkpoints"
    link.symlink_to(folder, target_is_directory=True)
    return link


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No logs of Orbax's handlers, and none of the reads that a failed one leaves unfinished."""
    _mute_late_reads()
    loggers = [logging.getLogger(name) for name in _NOISY]
    before = [log.disabled for log in loggers]
    try:
        for log in loggers:
            log.disabled = True
        yield
    except BaseException as error:
        _forget_tasks(error)
        raise
    finally:
        for log, disabled in zip(loggers, before, strict=True):
            log.disabled = disabled


def _forget_tasks(error: BaseException | None) -> None:
    """Collects the tasks and coroutines that an error left over, each of which complains of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        gc.collect()


def _mute_late_reads() -> None:
    """Reads that end after their event loop was closed would print a traceback each, much later."""
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)
    logging.getLogger("asyncio").addFilter(_is_of_others)  # which adds it once


class _Hook:
    def __init__(self, before: Callable[[Any], Any]):
        self._before = before

    def __call__(self, found: Any) -> None:
        closed = isinstance(found.exc_value, RuntimeError)
        if not (closed and str(found.exc_value) == "Event loop is closed"):
            self._before(found)


def _is_of_others(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return "tensorstore_spec" not in str(error)
