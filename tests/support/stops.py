"""Seconds from SIGTERM to the end of a run, by what it was doing: `python stops.py FOLDER`.

Each run must end with exit code 0 and with digests of the state of the step at which it stopped.
Further words are those of the run, by default a model of three million parameters.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WORDS = """tiny adamw --model.width 256 --model.layers 4 --model.heads 8 --batch-size 8 --steps 30
--warmup-steps 1 --evaluate-every 10 --output.checkpoint-every 1000 --output.log-every 1"""


def rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def said(text: str) -> Callable[[Path], bool]:
    return lambda folder: text in folder.with_suffix(".log").read_text()


def trained(step: int) -> Callable[[Path], bool]:
    return lambda folder: any(row["step"] == step and "loss" in row for row in rows(folder))


def saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def done(folder: Path) -> bool:
    """The last step is saved and evaluated; only the sample is left."""
    evaluated = any(row["step"] == 30 and "heldout_loss" in row for row in rows(folder))
    return evaluated and (folder / "checkpoints" / "30" / "digests.json").exists()


# Phase -> (when it has begun, seconds to wait then, flags)
FEW = ["--data.heldout-fraction", ".0005"]
PHASES = {
    "compiling": (said("compiling the step"), 1.0, FEW),
    "step": (trained(3), 0.0, FEW),
    "save": (saving, 0.0, [*FEW, "--output.checkpoint-every", "2"]),
    "evaluation": (trained(10), 5.0, []),
    "sample": (done, 0.5, FEW),
}


def stop(folder: Path, words: list[str], phase: str) -> tuple[float, int, str]:
    """(seconds, exit code, steps with digests)."""
    begun, wait, flags = PHASES[phase]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "train", *words, *flags, "--output.folder", str(folder)]
    with folder.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while not begun(folder) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGTERM)
        start = time.perf_counter()
        code = process.wait()
    seconds = time.perf_counter() - start
    saved = [path.parent.name for path in (folder / "checkpoints").glob("*/digests.json")]
    return seconds, code, " ".join(sorted(saved)) or "none"


def main(place: Path, words: list[str]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    cache = ["--output.compile-cache", str(place / "xla")]
    print("phase       seconds  exit code  saved steps  said")
    for phase in PHASES:
        # Compiling must take its time, all else need not.
        own = ["--output.compile-cache", ""] if phase == "compiling" else cache
        seconds, code, saved = stop(place / phase, [*words, *own], phase)
        told = re.findall(
            r"^stopped .*;|^to train longer", (place / f"{phase}.log").read_text(), re.M
        )
        print(f"{phase:11} {seconds:7.1f}  {code:9}  {saved:11}  {told}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or WORDS.split())
