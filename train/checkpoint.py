"""Checkpoints of a run: saved in the background, restored onto any mesh, errors with a cure."""

import contextlib
import functools
import importlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from train import files

Metrics = Mapping[str, float] | None
_DISK = "check free space and permissions"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable, unwritable or of another model; says what to do."""


class _Unreadable(CheckpointError):
    """Damaged on disk, so that another step may do."""


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints in a local or mounted folder; leaving the context ends the last save.

    Kept are the last `keep_last` and, of those saved with metrics, the one of lowest `loss`.
    `save` acts on multiples of `save_interval` steps. The folder is made at the first save.
    """

    def __init__(self, directory: str | Path, *, save_interval: int, keep_last: int = 2):
        if save_interval < 1 or keep_last < 1:
            raise ValueError(f"{save_interval=} and {keep_last=} must be at least 1")
        self.directory = Path(directory).absolute()
        self._interval, self._keep_last = save_interval, keep_last
        self._current: int | None = None  # the step last saved or restored through this object
        self._saving: Any = None  # Orbax's answer to the save in progress
        self.record: dict[str, Any] = {}  # what was saved with the state last restored
        self.notes: list[str] = []  # what a user should know of the last `repair` and `restore`

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending; one that is still being written counts."""
        return [c.step for c in self._manager.checkpoints] if self.directory.is_dir() else []

    @property
    def latest(self) -> int | None:
        """The last of `steps`; None where there is none."""
        return max(self.steps, default=None)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Metrics = None,
        record: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Start to save a pytree of `jax.Array`; its buffers may be donated once this returns.

        Waits for the save before it and for the copy to the host. After `restore` of an older
        step the later ones are an abandoned future: the first save deletes those at or after it.
        `record`, plain JSON values, is kept beside the arrays.
        `force` saves off the interval too. Returns whether a save began: not for the step last
        saved or restored. Raises CheckpointError if this or the save before it failed, or if the
        folder holds `step` or a later one that this object neither saved nor went back from.
        """
        # Orbax knows intervals too, but takes milliseconds to say no.
        if step % self._interval and not force:
            return False
        if step == self._current and step in self.steps:  # not there if its save failed
            return False
        abandoned = [s for s in self.steps if s >= step]
        if abandoned and self._current is None:
            raise CheckpointError(
                f"{self.directory} already holds the steps {abandoned} of another run: "
                "resume that run, or give this one a folder of its own"
            )
        with self._explain(f"step {step} or the one before was not saved", _DISK):
            for s in abandoned:
                self._manager.delete(s)
            values = None if metrics is None else {k: float(v) for k, v in metrics.items()}
            beside = None if record is None else dict(record)
            self._finish()
            self._saving = self._manager.save_async(
                step, state, force=True, metrics=values, custom_metadata=beside
            )
        self._current = step
        return True

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        *,
        accept: Callable[[Mapping[str, Any]], object] = lambda record: None,
        sound: Callable[[Any], bool] = lambda state: True,
        part: bool = False,
    ) -> tuple[int, Any]:
        """Read (step, state) onto the devices that `abstract_state` names, from whatever mesh.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct` with shardings; `step` is one of
        `steps`, by default the last that can be read: `notes` tell of those that could not.
        `accept` is shown what was saved beside the arrays, before these are read, and may raise.
        A state that is not `sound` is one that cannot be read.
        With `part` leaves that `abstract_state` lacks are not read; it may be of plain dicts then.
        Raises CheckpointError.
        """
        steps = self.steps
        if not steps:
            what = "holds no checkpoint" if self.directory.is_dir() else "does not exist"
            raise CheckpointError(f"{self.directory} {what}: give the folder of a run that saved")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} has no step {step}: restore one of {steps}")
        errors: list[CheckpointError] = []
        for candidate in steps[::-1] if step is None else [step]:
            try:
                state = self._read(candidate, steps, abstract_state, accept, part)
                if not sound(state):
                    raise _Unreadable(
                        f"{self.directory}: step {candidate} is damaged (its parameters are not "
                        f"finite, and such are never saved); {_cure(candidate, steps)}"
                    )
            except _Unreadable as error:
                errors.append(error)
                continue
            self.notes += [f"{error}" for error in errors]
            if errors:
                self.notes.append(f"going on from step {candidate} instead")
            self._current = candidate
            return candidate, state
        if len(errors) > 1:
            first = str(errors[0]).rpartition("; ")[0]
            raise CheckpointError(
                f"{first}; nor can the others be read: start again, or from a copy"
            )
        raise errors[0]

    def abandon_later(self) -> list[int]:
        """Deletes the steps after the one last restored, and tells which these were.

        Where their metrics are about to go, they must not be what the run goes on from next time.
        """
        restored = self._current
        later = [] if restored is None else [step for step in self.steps if step > restored]
        with self._explain(f"the steps {later} cannot be deleted", _DISK):
            for step in later:
                self._manager.delete(step)
        return later

    def repair(self) -> None:
        """Clears what a killed run left half-written; for the one process that owns the folder.

        A step whose metrics are damaged would keep all others from being opened: it loses them.
        """
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path)
        for path in self.directory.glob("[0-9]*/metrics/metrics"):
            try:
                json.loads(path.read_bytes())
            except ValueError:
                files.replace_text(path, "{}")
                step = path.parent.parent.name
                self.notes.append(f"the metrics of step {step} were damaged: it is no longer best")

    def _read(
        self,
        step: int,
        steps: list[int],
        abstract_state: Any,
        accept: Callable[..., object],
        part: bool,
    ) -> Any:
        cure = _cure(step, steps)
        with self._explain(f"step {step} is unreadable", cure, _Unreadable):
            self._manager.wait()
            metadata = self._manager.metadata(step)
        self.record = dict(metadata.custom_metadata or {})
        accept(self.record)
        with self._explain(f"step {step} is unreadable", cure, _Unreadable):
            saved = metadata.metadata
            if saved is not None:  # where the metadata is damaged, load says how
                _compare(saved, abstract_state, self.directory, part)
            context = _orbax().Context()
            context.pytree.loading.partial_load = part
            with context:
                return self._manager.load(step, abstract_state)

    def close(self) -> None:
        """Wait for the save in progress. Raises CheckpointError if it failed."""
        if "_manager" in self.__dict__:
            with self._explain("the last save failed", _DISK):
                self._finish()
                self._manager.close()

    def _finish(self) -> None:
        """Waits for the save in progress; unasked, its answer keeps a thread and three files.

        What went wrong in it the manager says at its next call.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            with contextlib.suppress(Exception):
                saving.result()

    def __exit__(self, *error: object) -> None:
        self.close()

    @functools.cached_property
    def _manager(self) -> Any:
        training = _orbax().training
        keep = training.preservation_policies
        best = keep.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)
        with self._explain("cannot be opened", "move the damaged step's folder out of it"):
            return training.Checkpointer(
                self.directory,
                save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(
                    self._interval
                ),
                preservation_policy=keep.AnyPreservationPolicy(
                    [keep.LatestN(self._keep_last), best]
                ),
            )

    @contextlib.contextmanager
    def _explain(
        self, what: str, cure: str, kind: type[CheckpointError] = CheckpointError
    ) -> Iterator[None]:
        """Orbax's errors and logs tell of its handlers; the first of the chain is the cause."""
        log = logging.getLogger("absl")
        disabled, log.disabled = log.disabled, True
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            root: BaseException = error
            while root.__cause__ is not None:
                root = root.__cause__
            cause = f"{type(root).__name__}: {str(root).partition(chr(10))[0][:200]}"
            raise kind(f"{self.directory}: {what} ({cause}); {cure}") from root
        finally:
            log.disabled = disabled


def _cure(step: int, steps: list[int]) -> str:
    others = [s for s in steps if s != step]
    return f"others are there: {others}, pick one by --step" if others else "it was the only one"


def _orbax() -> Any:
    """Imported late, since it takes half a second; under its stable name where it has one."""
    try:
        return importlib.import_module("orbax.checkpoint.v1")
    except ModuleNotFoundError:
        return importlib.import_module("orbax.checkpoint.experimental.v1")


def _rank(metrics: Mapping[str, float]) -> float:
    """What the best checkpoint has most of; a NaN would leave the order to chance."""
    loss = metrics.get("loss", math.nan)
    return -loss if math.isfinite(loss) else -math.inf


def _compare(saved: Any, abstract_state: Any, directory: Path, part: bool) -> None:
    """Orbax would cast a leaf of another dtype, and name no leaf of another shape."""
    have, want = _leaves(saved), _leaves(abstract_state)
    wrong = [
        f"{name} is {have.get(name, 'absent')} on disk and {want.get(name, 'absent')} here"
        for name in sorted(want if part else have | want)
        if have.get(name) != want.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"{directory} was saved with another model or optimizer: {len(wrong)} leaves differ, "
            f"{'; '.join(wrong[:3])}. Resume with the settings of that run, or start a new folder"
        )


def _leaves(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{[*leaf.shape]}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
