"""How Orbax is called: its module, its paths, what it keeps, and without its noise."""

import contextlib
import gc
import importlib
import logging
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_SPECIAL = re.compile(r"[][*?\\]")
_NOISY = ("absl", "asyncio", "root")


def module() -> Any:
    """Orbax v1, under its stable name if it has one; the import takes half a second."""
    try:
        return importlib.import_module("orbax.checkpoint.v1")
    except ModuleNotFoundError:
        return importlib.import_module("orbax.checkpoint.experimental.v1")


def checkpointer(folder: Path, keep_last: int, best: Callable[[Sequence[int]], int | None]) -> Any:
    """Orbax's writer of checkpoints. It keeps the last ones, and the best of them all.

    Args:
      folder: that exists.
      keep_last: how many of the last steps are kept.
      best: steps in the folder -> the one that is kept beside the last ones.
    """
    training = module().training
    keep = training.preservation_policies
    kept = keep.AnyPreservationPolicy([keep.LatestN(keep_last), _KeepBest(best)])
    return training.Checkpointer(folder, preservation_policy=kept)


class _KeepBest:
    """Orbax's interface of a policy that says which checkpoints are kept."""

    def __init__(self, best: Callable[[Sequence[int]], int | None]):
        self._best = best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        best = self._best(steps)
        return [step == best for step in steps]


def metadata(path: Path) -> tuple[Any, Any]:
    """(the saved state with a shape and a dtype for each leaf, the manifest) of a step.

    The state is None where Orbax cannot read its description.
    """
    found = module().metadata(path, "state")
    return found.metadata, found.custom_metadata


def load(path: Path, target: Any, *, part: bool) -> Any:
    """Loads a state onto the devices that `target` names; with `part`, only its leaves."""
    orbax = module()
    context = orbax.Context()
    context.pytree.loading.partial_load = part
    with context:
        return orbax.load(path, target, checkpointable_name="state")


def plain(folder: Path, stack: contextlib.ExitStack) -> Path:
    r"""The folder, through a link in a temporary folder if its path has special characters.

    Orbax joins the path to `glob` patterns, where [, * and ? have a meaning, and TensorStore takes
    \ for /: a checkpoint under such a path could be saved but not read.

    Args:
      folder: that exists.
      stack: removes the link when it closes.

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
    """Silences the logs of Orbax's handlers, and of reads that a failed one leaves unfinished."""
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
    """Collects the tasks and coroutines that an error left over; each would log a complaint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        gc.collect()


def _mute_late_reads() -> None:
    """Silences reads that end after their event loop; each would print a traceback much later."""
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)
    logging.getLogger("asyncio").addFilter(_is_of_others)  # adding it again changes nothing


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
