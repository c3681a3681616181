"""The speed of readers, `prepare` and batches: `python -m benchmarks.data_speed` (a minute).

Rates are per second of processor time, which a busy machine does not change, and per second of
wall-clock time. By default the embedded text is read as bytes. For GPT-2's tokens, pass the folder
of `benchmarks.corpus`: --text 'FOLDER/text/*.txt' --tokenizer FOLDER/gpt2. With --step the script
measures what batches add to the steps of a tiny model, in another minute.
"""

import argparse
import csv
import gzip
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from train import data, program
from train.config.presets import preset
from train.config.schema import Config
from train.data import DataConfig
from train.data.prepare import documents
from train.data.prepare.prepare import prepare
from train.data.prepare.source_files import source_files
from train.optimizers.base import Due

LENGTH = 1024
ROWS = 64
COPIES = 16
"""Each document is repeated this often, so that a read takes longer than a clock tick."""


def timed(work: Callable[[], int], seconds: float = 0.5) -> tuple[float, float]:
    """The sum of what `work` returns, per second of processor time and of wall-clock time."""
    work()
    total, cpu, wall = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        total += work()
    return total / (time.process_time() - cpu), total / (time.perf_counter() - wall)


def texts(pattern: str | None) -> list[str]:
    """Documents of some kilobytes."""
    if pattern is None:
        whole = [data.shakespeare().train.tobytes().decode()]
    else:
        files, _ = source_files(f"text:{pattern}", DataConfig())
        whole = [file.path.read_text("utf-8") for file in files]
    return [text[i : i + 4096] for text in whole for i in range(0, len(text), 4096)]


def write(folder: Path, found: list[str]) -> dict[str, Path]:
    """Writes the documents in every format."""
    paths = {kind: folder / f"all.{kind}" for kind in ("text", "jsonl", "csv")}
    records = [{"text": text, "label": i % 2} for i, text in enumerate(found)]
    paths["text"].write_text("<|end|>".join(found))
    paths["jsonl"].write_text("".join(json.dumps(record) + "\n" for record in records))
    with paths["csv"].open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"])
        table.writeheader()
        table.writerows(records)
    paths["jsonl.gz"] = folder / "all.jsonl.gz"
    paths["jsonl.gz"].write_bytes(gzip.compress(paths["jsonl"].read_bytes(), 6))
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        return paths
    paths["parquet"] = folder / "all.parquet"
    columns = {"text": found, "url": [text[::-1] for text in found]}
    pq.write_table(pa.table(columns), paths["parquet"], row_group_size=1000)
    return paths


def readers(paths: dict[str, Path]) -> dict[str, tuple[float, float]]:
    """Bytes of text per second from each format."""
    config = DataConfig(separator="<|end|>")

    def read(kind: str, path: Path) -> int:
        files, fields = source_files(f"{kind}:{path}", config)
        found = (documents.documents(file, config, fields, []) for file in files)
        return sum(len(text.encode()) for texts in found for (text,) in texts)

    return {
        name: timed(lambda name=name, path=path: read(name.partition(".")[0], path))
        for name, path in paths.items()
    }


def tasks(folder: Path, paths: dict[str, Path], tokenizer: str) -> dict[str, tuple[float, float]]:
    """Tokens per second in batches of prepared data."""
    stored, labelled = f"bin:{folder / 'tokens'}", f"jsonl:{paths['jsonl']}"
    configs = {
        "embedded": {"source": "embedded", "tokenizer": "bytes"},
        "bin": {"source": stored},
        "bin, segments": {"source": stored, "segments": True},
        "mixture of two": {"source": f"{stored}:0.7,{stored}:0.3"},
        "masked": {"source": stored, "task": "masked"},
        "classify": {"source": labelled, "task": "classify"},
    }
    rates = {}
    for name, changes in configs.items():
        config = DataConfig(**{"tokenizer": tokenizer, **changes})
        try:
            found = data.load(config, batch_size=ROWS, sequence_length=LENGTH, seed=0)
        except ValueError as error:  # a tokenizer without [MASK]
            print(f"{name}: {error}")
            continue
        steps = itertools.count()
        rates[name] = timed(lambda f=found, s=steps: f.batch(next(s)).inputs.size)
    return rates


def measure(pattern: str | None, tokenizer: str, copies: int) -> dict[str, tuple[float, float]]:
    """All rates: MB/s of readers and of `prepare`, Mtokens/s of `prepare` and of batches."""
    rates: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write(folder, texts(pattern) * copies)
        for kind, rate in readers(paths).items():
            rates[f"read {kind}, MB/s"] = rate
        config = DataConfig(tokenizer=tokenizer)
        cpu = time.process_time()
        header = prepare(f"jsonl:{paths['jsonl']}", folder / "tokens", config, quiet=True)
        cpu = time.process_time() - cpu
        for what, unit in (("tokens", "Mtokens/s"), ("bytes", "MB/s")):
            total = sum(split[what] for split in header["splits"].values())
            rates[f"prepare, {unit}"] = total / cpu, total / header["seconds"]
        for task, rate in tasks(folder, paths, tokenizer).items():
            rates[f"batches of {task}, Mtokens/s"] = rate
    return {name: (cpu / 1e6, wall / 1e6) for name, (cpu, wall) in rates.items()}


def added(run: Config, steps: int, rounds: int) -> tuple[float, float]:
    """The time that making batches adds to a loop of steps on one device.

    Args:
      run: the config.
      steps: steps of a loop; the host runs one step ahead, as in training.
      rounds: pairs of loops: one makes a batch for each step, the other reuses one batch.

    Returns:
      (added share of the time of the second loop, its standard error over the rounds).
    """
    programs = program.assemble(run, jax.devices()[:1])
    step, state, same = programs.compile(Due()), programs.init(), programs.batch(0)

    def seconds(make: Callable[[int], Any], first: int) -> float:
        nonlocal state
        start, late = time.perf_counter(), same.inputs
        for number in range(first, first + steps):
            state, measured = step(state, make(number))
            jax.block_until_ready(late)
            late = measured["loss"]
        jax.block_until_ready(late)
        return time.perf_counter() - start

    ratios = []
    for number in range(rounds + 1):
        own = seconds(programs.batch, number * steps)
        ratios.append(own / seconds(lambda _: same, 0))
    kept = np.array(ratios[1:])  # the first round warms up
    return float(kept.mean() - 1), float(kept.std(ddof=1) / len(kept) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", help="glob of text files (the embedded text)")
    parser.add_argument("--tokenizer", default="bytes", help="as --data.tokenizer")
    parser.add_argument("--copies", type=int, default=COPIES, help="repetitions of each document")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--step", action="store_true", help="measure what batches add to a step")
    args = parser.parse_args()
    if args.step:
        share, error = added(preset("tiny", "adamw"), 60, 40)
        print(f"batches add {share:.1%} ± {error:.1%} to the steps of the tiny model")
        return
    rates = measure(args.text, args.tokenizer, args.copies)
    table = Table("", "per processor second", "per second")
    for name, (cpu, wall) in rates.items():
        table.add_row(name, f"{cpu:.1f}", f"{wall:.1f}")
    Console(width=100).print(table)
    if args.json:
        args.json.write_text(json.dumps(rates, indent=1) + "\n")


if __name__ == "__main__":
    main()
