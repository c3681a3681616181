"""SHA-256 of each file of a checkpoint, written beside the files and compared before a restore.

Digests of files find a flipped bit in any file, whatever mesh the arrays are restored onto; digests
of arrays would not.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from models import reading
from train import files

FILE = "digests.json"
_KEY = "sha256"
_DESCRIPTION = "_CHECKPOINT_METADATA"  # Orbax reads that of every step before it writes a step


def write(folder: Path) -> None:
    """Syncs the files of a finished checkpoint to the disk, then writes their digests."""
    for directory, _, names in os.walk(folder):
        for name in names:
            files.sync(Path(directory, name))
        files.sync_folder(Path(directory))
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    have = _digests(folder, sorted(name for name in found if name != FILE))
    files.replace_text(folder / FILE, json.dumps({_KEY: have}, separators=(",", ":")))
    files.sync_folder(folder.parent)


def fault(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; empty if nothing, None without digests."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with reading.fields_of(path):
            want = dict(reading.read_json(path)[_KEY])
        return _difference(folder, want)
    except ValueError as error:
        return str(error).removesuffix(".")


def description_fault(folder: Path) -> str:
    """What is wrong with the file in which Orbax describes a checkpoint; empty if nothing."""
    path, sums = folder / _DESCRIPTION, folder / FILE
    if not path.is_file():
        return ""
    try:
        reading.read_json(path)
        with reading.fields_of(sums):
            stored = reading.read_json(sums)[_KEY] if sums.is_file() else {}
            want = {_DESCRIPTION: stored[_DESCRIPTION]} if stored else {}
        return _difference(folder, want)
    except ValueError as error:
        return str(error).removesuffix(".")


def _difference(folder: Path, want: dict[str, str]) -> str:
    if missing := [name for name in want if not (folder / name).is_file()]:
        return f"{missing[0]} is missing"
    have = _digests(folder, list(want))
    wrong = [name for name in want if have[name] != want[name]]
    return f"{wrong[0]} has changed since it was written: its digest differs" if wrong else ""


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
