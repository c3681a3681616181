"""Checkpoints of a run: saved in the background by Orbax, and restored onto any mesh."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from train.checkpoint import digests, leaves, old_layouts, orbax_calls, policy, step_folders
from train.checkpoint.errors import CheckpointError, Unreadable, explained

_DISK = "check free space and permissions"


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints in a local or mounted folder; leaving the context awaits the last save.

    The folder is made at the first save. A save keeps the last `keep_last` steps, and the step
    with the lowest of the `losses` that are known when it begins. It deletes all other steps.
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 2):
        if keep_last < 1:
            raise ValueError(f"{keep_last=} must be at least 1")
        self.directory = Path(directory).absolute()
        self._keep_last = keep_last
        self._current: int | None = None  # the step last saved or restored through this object
        # The step of the save in progress, and its end.
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self._stack = contextlib.ExitStack()  # closed with the manager
        self.losses: dict[int, float] = {}  # step -> held-out loss, which is known after its save
        self.faults: dict[int, str | None] = {}  # step -> `digests.fault`, for steps looked at
        self.manifest: dict[str, Any] = {}  # of the state last restored
        self.notes: list[str] = []  # for the user, from the last `repair` and `restore`

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending; a step that is still being written counts.

        Raises:
          CheckpointError: something has the name of a step and is not a folder.
        """
        found = step_folders.steps_in(self.directory) if self.directory.is_dir() else set()
        pending = set() if self._saving is None else {self._saving[0]}
        return sorted(found | pending)

    @property
    def latest(self) -> int | None:
        """The last of `steps`; None without any."""
        return max(self.steps, default=None)

    def save(self, step: int, state: Any, manifest: Mapping[str, Any] | None = None) -> bool:
        """Starts to save a state; its buffers may be donated once this returns.

        It waits for the previous save, and for the copy of the state to the host. After `restore`
        of an older step the later ones belong to an abandoned future: the first save deletes
        those at or after its own step.

        Args:
          step: steps done.
          state: a pytree of `jax.Array`.
          manifest: plain JSON values, kept beside the arrays.

        Returns:
          Whether a save began. The step last saved or restored is not saved again.

        Raises:
          CheckpointError: this save or the previous one failed, or the folder holds this step or a
            later one that this object has neither saved nor gone back from.
        """
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
            beside = None if manifest is None else dict(manifest)
            saving = self._manager.save_async(step, state, force=True, custom_metadata=beside)
            self._saving = step, self._background.submit(self._seal, step, saving)
        self.faults.pop(step, None)
        self._current = step
        return True

    def _seal(self, step: int, saving: Any) -> None:
        """Waits for a save, then writes its digests. The manager's next call raises its errors.

        A run that is killed in between leaves a checkpoint without digests, which can be restored.
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
        accept: Callable[[Mapping[str, Any]], object] = lambda manifest: None,
        wrong: Callable[[int, Any], str] = lambda step, state: "",
        part: bool = False,
    ) -> tuple[int, Any]:
        """Reads a state onto the devices that `abstract_state` names, whatever mesh it was on.

        Args:
          abstract_state: a pytree of `jax.ShapeDtypeStruct` with shardings.
          step: one of `steps`; default the last that can be read. A step cannot be read if its
            files have other digests than those beside them, or if `wrong` finds a problem.
          accept: called with the manifest before the arrays are read; it may raise.
          wrong: (step, state) -> what is wrong with the state; empty if nothing.
          part: do not read leaves that `abstract_state` lacks; it may consist of plain dicts then.

        Returns:
          (step, state). `notes` names the steps that could not be read.

        Raises:
          CheckpointError: no step can be read.
        """
        errors: list[CheckpointError] = []
        with self._explain("the last save failed", _DISK):
            self._finish()
        for candidate in self._candidates(step):
            try:
                state = self._read(candidate, abstract_state, accept, part)
                self._must(candidate, wrong(candidate, state))
            except Unreadable as error:
                errors.append(error)
                continue
            self._note(candidate, errors)
            self._current = candidate
            return candidate, state
        raise _none_readable(errors)

    def verify(self, step: int | None = None) -> dict[int, str | None]:
        """The `faults` that `restore` needs: one process may read all files for the others."""
        for candidate in self._candidates(step):
            if not self._fault(candidate):
                break
        return self.faults

    def abandon_later(self) -> list[int]:
        """Deletes the steps after the one last restored, and returns them.

        Their metrics are about to be dropped, so no later run may resume from them.
        """
        restored = self._current
        later = [] if restored is None else [step for step in self.steps if step > restored]
        with self._explain(f"the steps {later} cannot be deleted", _DISK):
            for step in later:
                self._manager.delete(step)
        return later

    def repair(self) -> None:
        """Clears what a killed run left half-written; only the owner of the folder may call it."""
        step_folders.clear_half_written(self.directory)
        self.notes += step_folders.set_damaged_aside(self.directory, self.steps)

    def close(self) -> None:
        """Waits for the save in progress.

        Raises:
          CheckpointError: it failed.
        """
        with self._explain("the last save failed", _DISK), self._stack:
            self._finish()
            if "_manager" in self.__dict__:
                self._manager.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _finish(self) -> None:
        """Waits for the save in progress and its digests."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving[1].result()

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

    def _fault(self, step: int) -> str | None:
        if step not in self.faults:
            self.faults[step] = digests.fault(self.directory / str(step))
        return self.faults[step]

    def _must(self, step: int, wrong: str | None) -> None:
        if wrong:
            cure = _cure(step, self.steps)
            raise Unreadable(f"{self.directory}: step {step} is damaged ({wrong}); {cure}")

    def _read(
        self, step: int, abstract_state: Any, accept: Callable[..., object], part: bool
    ) -> Any:
        self._must(step, self._fault(step))
        cure, path = _cure(step, self.steps), self._place / str(step)
        with self._explain(f"step {step} is unreadable", cure, Unreadable):
            saved, manifest = orbax_calls.metadata(path)
            self.manifest = dict(manifest or {})
        accept(self.manifest)
        with self._explain(f"step {step} is unreadable", cure, Unreadable):
            return self._load(path, saved, abstract_state, part)

    def _load(self, path: Path, saved: Any, abstract_state: Any, part: bool) -> Any:
        if saved is None:  # the metadata is damaged, and loading says how
            return orbax_calls.load(path, abstract_state, part=part)
        wanted = old_layouts.under_saved_names(saved, abstract_state)
        new = old_layouts.added(saved, wanted)
        self._compare(saved, wanted, part, new)
        if not old_layouts.is_older(saved, abstract_state):
            return orbax_calls.load(path, abstract_state, part=part)
        older = old_layouts.in_older_layout(saved, abstract_state)
        state = orbax_calls.load(path, older, part=part)
        return old_layouts.in_this_layout(state, abstract_state, new)

    def _compare(self, saved: Any, abstract_state: Any, part: bool, new: Mapping[str, Any]) -> None:
        if wrong := leaves.differences(saved, abstract_state, part=part, new=new):
            raise CheckpointError(
                f"{self.directory} was saved with another model or optimizer: {len(wrong)} leaves "
                f"differ, {'; '.join(wrong[:3])}. Resume with the settings of that run, or start a "
                "new folder"
            )

    def _note(self, step: int, errors: Sequence[CheckpointError]) -> None:
        """Notes which steps were passed over, and that a step has no digests."""
        self.notes += [f"{error}" for error in errors]
        if errors:
            self.notes.append(f"going on from step {step} instead")
        if self.faults[step] is None:
            self.notes.append(
                f"step {step} has no digests, because an older version saved it or its save was "
                "cut short: damage in it would not be noticed"
            )

    @functools.cached_property
    def _place(self) -> Path:
        return orbax_calls.plain(self.directory, self._stack)

    @functools.cached_property
    def _background(self) -> concurrent.futures.Executor:
        return self._stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))

    @functools.cached_property
    def _manager(self) -> Any:
        with self._explain("cannot be opened", "move what is damaged out of it"):
            self.directory.mkdir(parents=True, exist_ok=True)
            step_folders.steps_in(self.directory)
            best = functools.partial(policy.best_step, losses=self.losses)
            return orbax_calls.checkpointer(self._place, self._keep_last, best)

    def _explain(
        self, what: str, cure: str, kind: type[CheckpointError] = CheckpointError
    ) -> contextlib.AbstractContextManager[None]:
        return explained(self.directory, what, cure, kind)


def _none_readable(errors: Sequence[CheckpointError]) -> CheckpointError:
    """The error of the newest step; where there were others, it says so."""
    if len(errors) == 1:
        return errors[0]
    first = str(errors[0]).rpartition("; ")[0]
    return CheckpointError(f"{first}; nor can the others be read: start again, or from a copy")


def _cure(step: int, steps: list[int]) -> str:
    others = [s for s in steps if s != step]
    return f"others are there: {others}, pick one by --step" if others else "it was the only one"
