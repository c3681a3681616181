"""`metrics.jsonl`: one row of metrics per line, which a killed run keeps."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models import reading
from train import files

FILE = "metrics.jsonl"


class JsonLines:
    """Appends to `folder/metrics.jsonl`, after dropping the rows after step `start`.

    Args:
        folder: that exists.
        start: steps already done; 0 begins the file anew.
    """

    def __init__(self, folder: Path, start: int = 0):
        self._path = folder / FILE
        rows = _rows(self._path) if start and self._path.exists() else []
        self.kept = [row for row in rows if row["step"] <= start]
        with self._explain():
            lines = "".join(json.dumps(row) + "\n" for row in self.kept)
            files.replace_text(self._path, lines)
            self._file = self._path.open("a", buffering=1)  # so a killed run loses no whole line

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line; values that are not finite become null."""
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        with self._explain():
            self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def sync(self) -> None:
        """Waits until the lines are on the disk; a checkpoint must not be ahead of them."""
        with self._explain():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is written after it."""
        with self._explain():
            self._file.close()

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: metrics cannot be written, check free space and permissions",
                str(self._path),
            ) from error


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of `folder/metrics.jsonl`, in the order of the file; null becomes NaN.

    A last line that a kill cut short is left out.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a line is not a row. The last line may also be a torn one.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the folder of a run that has started")
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a torn last line."""
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = reading.parse_json(line, where)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{where} is not JSON: delete the line") from error
            continue
        if not _is_row(row):
            raise ValueError(f"{where} is not a step with its metrics: delete the line")
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Whether it is an object with a step, and all else a number or null."""
    if not isinstance(row, dict) or any(isinstance(v, str | list | dict) for v in row.values()):
        return False
    return isinstance(row.get("step"), int) and row["step"] >= 0
