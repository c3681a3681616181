"""Mutation testing: each fault of mutants.toml is made in a copy, and the tests must notice it.

    python -m tests.mutants --results mutants.jsonl

A fault is killed where a test fails, or where the tests outlast --timeout. A fault whose text is
not found exactly once, or whose tests cannot even be collected, is an error, and so is a test that
fails without any fault. With --results a later call goes on where this one ended: it passes over
each fault that the file has for the same sources and tests.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".toml")
SOURCES = ("sophia_optax", "models", "train")
OUTCOMES = {0: "survived", 1: "killed"}  # by the exit status of pytest; all others are errors
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header")
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "evidence", "runs")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault: in the file that has it, the text `old` becomes `new`."""

    room: str
    name: str
    old: str
    new: str
    tests: str
    """Arguments of pytest, such as `test_data.py::test_a test_loss.py -k weighted`."""


def read_table(path: Path = TABLE) -> list[Mutant]:
    """All mutants, in the order of the table."""
    rooms = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Mutant(room, **fields) for room, mutants in rooms.items() for fields in mutants]


def source_of(mutant: Mutant, root: Path = ROOT) -> Path:
    """The one source file that has the mutant's text, exactly once."""
    files = [file for folder in SOURCES for file in sorted((root / folder).rglob("*.py"))]
    found = [file for file in files for _ in range(file.read_text("utf-8").count(mutant.old))]
    if len(found) != 1 or mutant.old == mutant.new:
        places = ", ".join(str(file.relative_to(root)) for file in found) or "no file"
        raise ValueError(f"{mutant.name}: its text must be in one place, but is in {places}")
    return found[0]


def arguments_of(mutant: Mutant, root: Path = ROOT) -> list[str]:
    """The mutant's tests with the path of each file, which must have the function named."""
    return [_with_path(word, root) for word in shlex.split(mutant.tests)]


def _with_path(word: str, root: Path) -> str:
    match = re.fullmatch(r"(test_\w+\.py)(?:::(\w+))?(.*)", word)
    if not match:
        return word
    name, function, rest = match.groups(default="")
    files = sorted((root / "tests").rglob(name))
    if len(files) != 1:
        raise ValueError(f"{word}: {len(files)} files under tests/ have this name")
    if function and f"def {function}(" not in files[0].read_text("utf-8"):
        raise ValueError(f"{word}: {files[0].relative_to(root)} has no such test")
    path = str(files[0].relative_to(root))
    return path + (f"::{function}" if function else "") + rest


def run_tests(copy: Path, arguments: Sequence[str], timeout: float | None) -> tuple[str, str]:
    """Run pytest in the copy: its outcome, and what it printed."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant of the same size and second would meet the old
        "JAX_PLATFORMS": "cpu",
        # What a mutant leaves alone is compiled once: the key of a program is all of its text.
        "JAX_COMPILATION_CACHE_DIR": str(copy.parent / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, *PYTEST, *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        pipes: dict[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command, cwd=copy, env=environment, start_new_session=True, **pipes
        )
        try:
            outcome = OUTCOMES.get(process.wait(timeout), "error")
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return "killed", "hung"
        out.seek(0)
        return outcome, out.read()


def try_mutant(mutant: Mutant, copy: Path, timeout: float) -> dict[str, str | float]:
    """Make the fault in the copy, run its tests, and take the fault back."""
    start = time.perf_counter()
    try:
        file, arguments = source_of(mutant, copy), arguments_of(mutant, copy)
        text = file.read_text("utf-8")
        file.write_text(text.replace(mutant.old, mutant.new), "utf-8")
        try:
            outcome, said = run_tests(copy, arguments, timeout)
        finally:
            file.write_text(text, "utf-8")
    except ValueError as error:
        outcome, said = "error", str(error)
    seconds = round(time.perf_counter() - start, 1)
    return {"outcome": outcome, "why": _reason(outcome, said), "seconds": seconds}


def _reason(outcome: str, said: str) -> str:
    failed = re.search(r"^(?:FAILED|ERROR) (.*)", said, re.MULTILINE)
    if outcome == "survived":
        return ""
    return failed[1][:160] if failed else said.strip().rpartition("\n")[2][:160]


def check_unmutated(pending: list[Mutant], copy: Path) -> None:
    """All tests that are to be run must pass as they are: else no kill proves anything."""
    selections = {m.tests: arguments_of(m, copy) for m in pending}
    alone = [words for words in selections.values() if any(w.startswith("-") for w in words)]
    together = sorted({w for words in selections.values() if words not in alone for w in words})
    for words in [*([together] if together else []), *alone]:
        outcome, said = run_tests(copy, words, None)
        if outcome != "survived":
            raise SystemExit(f"The tests fail without any mutant: {_reason(outcome, said)}")


def keys_of(mutants: list[Mutant]) -> dict[Mutant, str]:
    """Hash of each mutant with all sources and tests."""
    files = [file for folder in (*SOURCES, "tests") for file in (ROOT / folder).rglob("*.py")]
    shared = hashlib.sha256()
    for file in sorted(file for file in files if "mutants" not in file.name):
        shared.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    whole = [(m, shared.hexdigest() + repr(m)) for m in mutants]
    return {m: hashlib.sha256(text.encode()).hexdigest()[:16] for m, text in whole}


def read_results(path: Path | None) -> dict[str, dict]:
    """What was found before, by the key of its mutant."""
    if path is None or not path.exists():
        return {}
    return {row["key"]: row for row in map(json.loads, path.read_text("utf-8").splitlines())}


def results_of(
    pending: list[Mutant], jobs: int, timeout: float
) -> Iterator[tuple[Mutant, dict[str, str | float]]]:
    """Try each mutant, in as many copies of the tree as there are jobs."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            copies.put(shutil.copytree(ROOT, Path(place, str(number)), ignore=IGNORED))
        check_unmutated(pending, Path(place, "0"))

        def attempt(mutant: Mutant) -> dict[str, str | float]:
            copy = copies.get()
            try:
                return try_mutant(mutant, copy, timeout)
            finally:
                copies.put(copy)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            yield from zip(pending, pool.map(attempt, pending), strict=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="regular expression of rooms, names or texts")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tried at a time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which it hangs")
    parser.add_argument("--results", type=Path, help="JSONL file to append to, and to go on from")
    return parser.parse_args()


def main() -> int:
    """Try the mutants that are asked for; 0 unless one of them is an error."""
    asked = _options()
    mutants = [m for m in read_table() if re.search(asked.only, f"{m.room} {m.name} {m.old}")]
    keys, known = keys_of(mutants), read_results(asked.results)
    pending = [m for m in mutants if keys[m] not in known]
    found = [known[keys[m]] for m in mutants if keys[m] in known]
    for mutant, result in results_of(pending, asked.jobs, asked.timeout) if pending else ():
        row = {"room": mutant.room, "name": mutant.name, **result, "key": keys[mutant]}
        found.append(row)
        print(f"{row['outcome']:9}{row['seconds']:6} s  {row['room']}: {row['name']}", flush=True)
        if row["outcome"] == "error":
            print(f"    {row['why']}", flush=True)
        if asked.results:
            with asked.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    total = Counter(row["outcome"] for row in found)
    print(", ".join(f"{total[name]} {name}" for name in ("killed", "survived", "error")))
    return int(total["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
