"""Models and tokenizers of `transformers`, imported and exported again.

    python -m benchmarks.transformers_roundtrip --python OTHER/bin/python

OTHER is a separate environment with torch, transformers and tokenizers. It makes small models of
each family, with tokenizers trained on Shakespeare. This environment imports each model, trains it
for three steps, and exports it. In OTHER, `AutoModel...` and `AutoTokenizer` load the exports.

The table has the largest difference of logits, whether the tokens of 1 MB of text are equal,
whether generation stops at the end of a document, and the special tokens and class names before and
after. The exit code is 1 if anything is wrong. It takes about three minutes on two cores.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from models import split
from train import loop
from train.checkpoint import warm_start
from train.cli import main as cli
from train.config import serialize
from train.config.presets import preset
from train.config.schema import Config, OutputConfig
from train.data import shakespeare, tokenizers

THERE = Path(__file__).with_name("transformers_there.py")
OWN = ("tiny", "tiny-llama", "tiny-bert")  # presets on bytes, which start in this environment
BYTES = 1_000_000
LABELS = ("good", "bad", "so-so")
TOLERANCE = 1e-4


def write_texts(folder: Path) -> None:
    """Writes 1 MB of text, and some of its lines with labels."""
    text = shakespeare().train[:BYTES].tobytes().decode()
    (folder / "text.txt").write_text(text, encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if len(line) > 20][:300]
    rows = [{"text": line, "label": LABELS[i % 3]} for i, line in enumerate(lines)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path, name: str) -> Path:
    """Trains three steps from an imported model or from a preset; returns the run's folder."""
    place = folder / "runs" / name
    if name in OWN:
        begun = preset(name, "adamw")
    else:
        words = ["import", str(folder / "source" / name), str(folder / "imported" / name)]
        if "classes" in name:
            words += ["--data.source", f"jsonl:{folder / 'labelled.jsonl'}"]
        cli.main(words)
        imported = folder / "imported" / name
        begun = dataclasses.replace(serialize.load(imported), start_from=str(imported))
    loop.train(short(begun, place))
    return place


def short(run: Config, place: Path) -> Config:
    """The same run with three steps and without output."""
    shown = OutputConfig(
        folder=str(place), compile_cache="", quiet=True, sample_length=0, checkpoint_every=3
    )
    sizes = {"steps": 3, "warmup_steps": 1, "batch_size": 4, "sequence_length": 32}
    return dataclasses.replace(run, **sizes, loss_chunk=0, evaluate_every=3, output=shown)


def export(folder: Path, name: str) -> None:
    """Exports a run, and saves what this environment computes with it."""
    place = train(folder, name)
    out = folder / "out" / name
    cli.main(["export", str(place), str(out)])
    loaded = warm_start.load(place)
    tokenizer = tokenizers.load(loaded.config.data.tokenizer)
    text = (folder / "text.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    stream = np.random.default_rng(0)
    tokens = stream.integers(0, loaded.config.model.vocab_size, (2, 32)).astype(np.int32)
    logits = np.asarray(jax.jit(split(loaded.config.model).apply)(loaded.params, tokens))
    if classes := getattr(loaded.config.model, "classes", 0):
        there = json.loads((out / "config.json").read_text())["id2label"]
        here = sorted(LABELS)
        logits = logits[:, [here.index(there[str(i)]) for i in range(classes)]]
    (folder / "ours").mkdir(exist_ok=True)
    np.savez(
        folder / "ours" / name,
        tokens=tokens,
        logits=logits,
        ids=ids,
        end=tokenizer.end,
        decoded=tokenizer.decode(ids[:5000]),
    )


def there(python: str, word: str, folder: Path) -> str:
    """The output of the other environment."""
    done = subprocess.run(
        [python, str(THERE), word, str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def rows(found: dict[str, dict]) -> list[tuple[list[str], bool]]:
    """The cells of each export, and whether everything is right."""
    made = []
    for name, one in found.items():
        before = one.get("before", one["roles"])
        close = one["difference"] <= TOLERANCE * max(1.0, one["largest"])
        right = close and one["equal"] and one["decoded"] and one.get("stops", True)
        right = right and one["roles"] == before
        right = right and one["names"] == one.get("names_before", one["names"])
        cells = [
            name,
            one["architecture"],
            f"{one['difference']:.1e} of {one['largest']:.2f}",
            f"{one['count']} {'equal' if one['equal'] and one['decoded'] else 'DIFFER'}",
            {True: "stops", False: "DOES NOT STOP", None: ""}[one.get("stops")],
            f"{before} -> {one['roles']}" if "before" in one else f"{one['roles']}",
            ", ".join(one["names"]),
        ]
        made.append((cells, right))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--python", required=True, help="Python of an environment with transformers"
    )
    parser.add_argument("--only", default="", help="names of models, separated by commas")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_texts(folder)
        there(args.python, "make", folder)
        names = [path.name for path in sorted((folder / "source").iterdir())]
        for name in args.only.split(",") if args.only else [*names, *OWN]:
            export(folder, name)
        found = json.loads(there(args.python, "check", folder).splitlines()[-1])
    table = Table(title="from transformers and back")
    for column in ("model", "loaded as", "logits", "tokens", "generation", "bos eos pad", "names"):
        table.add_column(column)
    made = rows(found)
    for cells, _ in made:
        table.add_row(*cells)
    Console(width=170).print(table)
    sys.exit(not all(right for _, right in made))


if __name__ == "__main__":
    main()
