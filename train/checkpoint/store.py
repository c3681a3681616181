"""Checkpoints of a run: saved in the background, restored onto any mesh, errors with a cure."""

import concurrent.futures
import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from models import reading
from train import files
from train.checkpoint import best, digests, leaves, old_layouts, orbax_calls

_DISK = "check free space and permissions"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable, unwritable or of another model; says what to do."""


class _Unreadable(CheckpointError):
    """Damaged on disk, so that another step may do."""


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints in a local or mounted folder; leaving the context ends the last save.

    Kept are the last `keep_last` and, of those in `losses`, the one of the lowest loss: both as
    they are known when a save begins. `save` acts on multiples of `save_interval` steps. The folder
    is made at the first save.
    """

    def __init__(self, directory: str | Path, *, save_interval: int, keep_last: int = 2):
        if save_interval < 1 or keep_last < 1:
            raise ValueError(f"{save_interval=} and {keep_last=} must be at least 1")
        self.directory = Path(directory).absolute()
        self._interval, self._keep_last = save_interval, keep_last
        self._current: int | None = None  # the step last saved or restored through this object
        # Step of the save in progress, and its end
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self._stack = contextlib.ExitStack()  # closed with the manager
        self.losses: dict[int, float] = {}  # step -> held-out loss, which is known after its save
        self.faults: dict[int, str | None] = {}  # step -> of `digests.fault`, as far as looked at
        self.record: dict[str, Any] = {}  # what was saved with the state last restored
        self.notes: list[str] = []  # what a user should know of the last `repair` and `restore`

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending; one that is still being written counts.

        Raises CheckpointError for what has a step's name and is no folder of its own.
        """
        found = _step_folders(self.directory) if self.directory.is_dir() else set()
        pending = set() if self._saving is None else {self._saving[0]}
        return sorted(found | pending)

    @property
    def latest(self) -> int | None:
        """The last of `steps`; None where there is none."""
        return max(self.steps, default=None)

    def save(
        self,
        step: int,
        state: Any,
        *,
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
            self._finish()
            for s in abandoned:
                self._manager.delete(s)
            beside = None if record is None else dict(record)
            saving = self._manager.save_async(step, state, force=True, custom_metadata=beside)
            self._saving = step, self._background.submit(self._seal, step, saving)
        self.faults.pop(step, None)
        self._current = step
        return True

    def _seal(self, step: int, saving: Any) -> None:
        """Waits for a save, then writes its digests; the manager tells at its next call of errors.

        A run that is killed in between goes on from a checkpoint without digests.
        """
        with contextlib.suppress(Exception):
            saving.result()
        folder = self.directory / str(step)
        if jax.process_index() == 0 and folder.is_dir():
            digests.write(folder)

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        *,
        accept: Callable[[Mapping[str, Any]], object] = lambda record: None,
        wrong: Callable[[int, Any], str] = lambda step, state: "",
        part: bool = False,
    ) -> tuple[int, Any]:
        """Read (step, state) onto the devices that `abstract_state` names, from whatever mesh.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct` with shardings; `step` is one of
        `steps`, by default the last that can be read: `notes` tell of those that could not. Files
        with another digest than the one beside them cannot, nor a state of which `wrong` says, by
        its step, what is wrong with it. `accept` is shown what was saved beside the arrays, before
        these are read, and may raise.
        With `part` leaves that `abstract_state` lacks are not read; it may be of plain dicts then.
        Raises CheckpointError.
        """
        errors: list[CheckpointError] = []
        with self._explain("the last save failed", _DISK):
            self._finish()
        for candidate in self._candidates(step):
            try:
                state = self._read(candidate, abstract_state, accept, part)
                self._must(candidate, wrong(candidate, state))
            except _Unreadable as error:
                errors.append(error)
                continue
            self.notes += [f"{error}" for error in errors]
            if errors:
                self.notes.append(f"going on from step {candidate} instead")
            if self.faults[candidate] is None:
                self.notes.append(
                    f"step {candidate} has no digests, since it is of an older version or its save "
                    "was cut short: damage in it would not be noticed"
                )
            self._current = candidate
            return candidate, state
        if len(errors) > 1:
            first = str(errors[0]).rpartition("; ")[0]
            raise CheckpointError(
                f"{first}; nor can the others be read: start again, or from a copy"
            )
        raise errors[0]

    def verify(self, step: int | None = None) -> dict[int, str | None]:
        """`faults`, with what `restore` needs: one process may ask for all, who take its answer."""
        for candidate in self._candidates(step):
            if not self._fault(candidate):
                break
        return self.faults

    def _fault(self, step: int) -> str | None:
        if step not in self.faults:
            self.faults[step] = digests.fault(self.directory / str(step))
        return self.faults[step]

    def _must(self, step: int, wrong: str | None) -> None:
        if wrong:
            cure = _cure(step, self.steps)
            raise _Unreadable(f"{self.directory}: step {step} is damaged ({wrong}); {cure}")

    def _candidates(self, step: int | None) -> list[int]:
        """The steps to try, in this order."""
        steps = self.steps
        if not steps:
            what = "holds no checkpoint" if self.directory.is_dir() else "does not exist"
            what += "".join(f" ({note})" for note in self.notes)
            raise CheckpointError(f"{self.directory} {what}: give the folder of a run that saved")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} has no step {step}: restore one of {steps}")
        return steps[::-1] if step is None else [step]

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

        A step whose own description is damaged would keep Orbax from writing any other: it is moved
        aside. Metrics, which older versions kept in each step, would too: they are emptied.
        """
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for path in self.directory.glob("[0-9]*/metrics/metrics"):
            try:
                reading.read_json(path)
            except ValueError:
                files.replace_text(path, "{}")
        for step in self.steps:
            folder = self.directory / str(step)
            if wrong := digests.description_fault(folder):
                aside = folder.rename(folder.with_name(f"damaged-{step}-{time.strftime('%H%M%S')}"))
                self.notes.append(f"step {step} is damaged ({wrong}): it is now {aside}")

    def _read(
        self,
        step: int,
        abstract_state: Any,
        accept: Callable[..., object],
        part: bool,
    ) -> Any:
        self._must(step, self._fault(step))
        cure, orbax, path = _cure(step, self.steps), orbax_calls.module(), self._place / str(step)
        with self._explain(f"step {step} is unreadable", cure, _Unreadable):
            metadata = orbax.metadata(path, "state")
            self.record = dict(metadata.custom_metadata or {})
        accept(self.record)
        with self._explain(f"step {step} is unreadable", cure, _Unreadable):
            saved, target, new, older = metadata.metadata, abstract_state, {}, False
            if saved is not None:  # where the metadata is damaged, load says how
                wanted = old_layouts.under_saved_names(saved, abstract_state)
                new = old_layouts.added(saved, wanted)
                self._compare(saved, wanted, part, new)
                older = old_layouts.is_older(saved, abstract_state)
            if older:
                target = old_layouts.in_older_layout(saved, abstract_state)
            context = orbax.Context()
            context.pytree.loading.partial_load = part
            with context:
                state = orbax.load(path, target, checkpointable_name="state")
            return old_layouts.in_this_layout(state, abstract_state, new) if older else state

    def _compare(self, saved: Any, abstract_state: Any, part: bool, new: Mapping[str, Any]) -> None:
        if wrong := leaves.differences(saved, abstract_state, part=part, new=new):
            raise CheckpointError(
                f"{self.directory} was saved with another model or optimizer: {len(wrong)} leaves "
                f"differ, {'; '.join(wrong[:3])}. Resume with the settings of that run, or start a "
                "new folder"
            )

    def close(self) -> None:
        """Wait for the save in progress. Raises CheckpointError if it failed."""
        with self._explain("the last save failed", _DISK), self._stack:
            self._finish()
            if "_manager" in self.__dict__:
                self._manager.close()

    def _finish(self) -> None:
        """Waits for the save in progress and its digests."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving[1].result()

    def __exit__(self, *error: object) -> None:
        self.close()

    @functools.cached_property
    def _place(self) -> Path:
        return orbax_calls.plain(self.directory, self._stack)

    @functools.cached_property
    def _background(self) -> concurrent.futures.Executor:
        return self._stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))

    @functools.cached_property
    def _manager(self) -> Any:
        training = orbax_calls.module().training
        keep = training.preservation_policies
        with self._explain("cannot be opened", "move what is damaged out of it"):
            self.directory.mkdir(parents=True, exist_ok=True)
            _step_folders(self.directory)
            return training.Checkpointer(
                self._place,
                save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(
                    self._interval
                ),
                preservation_policy=keep.AnyPreservationPolicy(
                    [keep.LatestN(self._keep_last), best.Best(self.losses)]
                ),
            )

    @contextlib.contextmanager
    def _explain(
        self, what: str, cure: str, kind: type[CheckpointError] = CheckpointError
    ) -> Iterator[None]:
        """Orbax's errors tell of its handlers; the first of the chain is the cause."""
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
            raise kind(f"{self.directory}: {what} ({cause}); {cure}") from root


def _step_folders(folder: Path) -> set[int]:
    """The steps with a folder. A link would lead writes elsewhere, a file would end in an error."""
    found = [path for path in folder.iterdir() if path.name.isdecimal()]
    for path in found:
        if path.is_symlink() or not path.is_dir():
            what = "a link" if path.is_symlink() else "a file"
            raise CheckpointError(
                f"{path} is {what} where the folder of a step should be: move it away, or put the "
                "folder itself there"
            )
    return {int(path.name) for path in found if str(int(path.name)) == path.name}


def _cure(step: int, steps: list[int]) -> str:
    others = [s for s in steps if s != step]
    return f"others are there: {others}, pick one by --step" if others else "it was the only one"
