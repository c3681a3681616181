"""A tiny run that is killed again and again: `python kills.py FOLDER KILLS OPTIMIZER`.

Each attempt is a fork of this process, which has imported JAX but not started it: an attempt costs
what a restart costs without the imports. Prints, as JSON, how the attempts ended and whether
the run that was killed is the run that was not.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ""  # one device

import jax
import numpy as np
import orbax.checkpoint.experimental.v1  # noqa: F401

from train import program
from train.checkpoint import run_folder
from train.cli import main as cli
from train.config import serialize
from train.parallel import xla_flags

xla_flags.add(xla_flags.QUICK)  # compiling is what takes long here
WORDS = """--model.width 16 --model.layers 1 --model.heads 2 --batch-size 8
--sequence-length 64 --steps 60 --warmup-steps 5 --evaluate-every 20 --output.checkpoint-every 2
--output.log-every 1 --output.sample-length 0"""
OPTIMIZER = sys.argv[3]
MOMENTS = ("save", "line", "term", "save", "line", "start")
TIMED = ("tokens_per_second",)


def fork(work, log):
    """The number of a process that does some work and ends with its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX has no threads yet
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        with log.open("a") as file, contextlib.redirect_stdout(file):
            os.dup2(file.fileno(), 2)
            work()
            code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        log.open("a").write(f"{error.code}\n")
    finally:
        os._exit(code)


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(moment, folder, rng, process):
    """Returns at a moment of the process's life, or when it ends: its exit status, or None."""
    start, goal = time.monotonic(), lines(folder) + rng.randint(2, 6)
    delay = rng.uniform(0, 0.02) if moment != "start" else rng.uniform(0.1, 2)
    while True:
        saving = any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        reached = {
            "save": saving and lines(folder) >= goal - 2,
            "start": time.monotonic() - start > delay,
        }.get(moment, lines(folder) >= goal)
        if reached:
            if moment in ("line", "term"):
                time.sleep(delay)
            return None
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)


def attempts(folder, kills, cache, log):
    """Goes on with a run until it is done, and kills it at that many moments: how each ended."""
    rng, ended = random.Random(0), []
    while len(ended) < 3 * kills + 3:
        moment = MOMENTS[len(ended) % len(MOMENTS)] if len(ended) < kills else "end"
        new = not (folder / "config.json").exists()
        words = [
            "tiny",
            OPTIMIZER,
            *WORDS.split(),
            "--output.folder",
            str(folder),
            "--output.compile-cache",
            cache,
        ]
        if not new:
            words = ["resume", str(folder), "--compile-cache", cache]
        process = fork(lambda words=words: cli.main(words), log)
        status = None if moment == "end" else wait_for(moment, folder, rng, process)
        if status is None:
            if moment != "end":
                os.kill(process, signal.SIGTERM if moment == "term" else signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
        ended.append((moment, os.waitstatus_to_exitcode(status)))
        if moment == "end":
            break
    return ended


def digest(folders, path):
    """Writes for each run the step of its last checkpoint and a hash of each array in it."""
    abstract, found = program.assemble(serialize.load(folders[0])).abstract, []
    for folder in folders:
        with run_folder.checkpoints(serialize.load(folder), folder) as checkpoints:
            step, state = checkpoints.restore(abstract)
        hashes = {
            jax.tree_util.keystr(key): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
            for key, leaf in jax.tree_util.tree_leaves_with_path(state)
        }
        found.append({"step": step, "hashes": hashes})
    path.write_text(json.dumps(found))


def rows(folder):
    """metrics.jsonl, line by line, without what a clock measured."""
    read = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read]


def main(place, kills):
    place.mkdir(parents=True, exist_ok=True)
    log, cache = place / "log.txt", str(place / "xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    whole, cut = place / "whole", place / "cut"
    first = attempts(whole, 0, cache, log)
    ended = attempts(cut, kills, cache, log)
    os.waitpid(fork(lambda: digest((whole, cut), place / "states.json"), log), 0)
    states = json.loads((place / "states.json").read_text())
    same = {"state": states[0] == states[1], "metrics": rows(whole) == rows(cut)}
    result = {"whole": first, "attempts": ended, "same": same}
    result["arrays"], result["step"] = len(states[0]["hashes"]), states[0]["step"]
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
