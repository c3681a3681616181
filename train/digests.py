"""SHA-256 of each file of a checkpoint, kept beside them and compared before they are read.

Files and not arrays: a flip in any file is found, whatever mesh the arrays are restored onto.
"""

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path

from models import reading
from train import files

FILE = "digests.json"
_KEY = "sha256"
_NOT_COVERED = ("metrics",)  # `Checkpoints.repair` rewrites those of older versions


def write(folder: Path) -> None:
    """Puts the files of a finished checkpoint on the disk, and after them their digests."""
    for directory, _, names in os.walk(folder):
        for name in names:
            files.sync(Path(directory, name))
        files.sync(Path(directory))
    text = json.dumps({_KEY: _digests(folder, _names(folder))}, separators=(",", ":"))
    files.replace_text(folder / FILE, text)
    files.sync(folder.parent)


def fault(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint: empty if nothing, None if it has no digests."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with reading.fields_of(path):
            want = reading.read_json(path)[_KEY]
            missing = sorted(set(want) - set(_names(folder)))
    except ValueError as error:
        return str(error).removesuffix(".")
    if missing:
        return f"{missing[0]} is missing"
    have = _digests(folder, list(want))
    wrong = [name for name in want if have[name] != want[name]]
    return f"{wrong[0]} was changed since it was written: its digest is another" if wrong else ""


def _names(folder: Path) -> list[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    covered = (path for path in found if path.parts[0] not in _NOT_COVERED)
    return sorted(path.as_posix() for path in covered if path.name != FILE)


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
