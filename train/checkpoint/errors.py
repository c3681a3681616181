"""Errors of checkpoints: what failed, why, and what to do about it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from train.checkpoint import orbax_calls


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable, unwritable or of another model; says what to do."""


class Unreadable(CheckpointError):
    """One step is damaged on disk; another step may still be readable."""


@contextlib.contextmanager
def explained(
    directory: Path, what: str, cure: str, kind: type[CheckpointError] = CheckpointError
) -> Iterator[None]:
    """Turns any error inside into a `kind` that names the folder, the cause and the cure.

    Orbax wraps the cause in errors about its handlers, so the first error of the chain is shown.
    """
    try:
        with orbax_calls.quiet():
            yield
    except CheckpointError:
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        cause = f"{type(root).__name__}: {str(root).partition(chr(10))[0][:200]}"
        raise kind(f"{directory}: {what} ({cause}); {cure}") from root
