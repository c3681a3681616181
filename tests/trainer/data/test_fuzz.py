"""No reader ends in another library's error, or takes memory without end, whatever a file holds.

`pytest tests/trainer/data/test_fuzz.py --fuzz 20000 --fuzz-seed 3` reads that many damaged files.
"""

import gzip
import json
import lzma
import random
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpora import DOCUMENTS, write_jsonl, write_tokens
from fuzzing import damaged, memory

import models
from models import huggingface, safetensors
from models.reading import LARGEST
from train.checkpoint import manifest
from train.checkpoint.store import CheckpointError, Checkpoints
from train.config import presets, serialize
from train.data import DataConfig, load, tokenizers
from train.data.prepare import documents as document_readers
from train.data.prepare import token_writer
from train.data.prepare.documents import documents
from train.data.prepare.header import read_header
from train.data.prepare.prepare import prepare
from train.data.prepare.records import SourceFile
from train.data.prepare.train_tokenizer import train_tokenizer
from train.data.source_string import KINDS
from train.logging import jsonl

pytest.importorskip("pyarrow", reason="the extra data is not installed")
pytest.importorskip("tokenizers", reason="the extra data is not installed")
pytest.importorskip("tiktoken", reason="the extra data is not installed")

LIMIT = 2**20  # bytes of a document
ALLOWED = 64 * 2**20  # bytes that a reader may take beside twice its limit
SECONDS = 30
TEXTS = DOCUMENTS[:12]
ERRORS = (ValueError, CheckpointError)


class Reader(NamedTuple):
    """What is read: files in a folder are made, one of them is damaged, and all are read again."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    files: str = "*"  # a glob of those to be damaged
    limit: int = LIMIT
    also: str = ""  # names a place too: a library's own files have names that nobody knows


def text_of(kind: str, name: str, **how: Any) -> Callable[[Path], object]:
    """Reads all documents of a file."""
    given = DataConfig(document_limit=LIMIT, **how)
    fields = ("text", "label") if given.task == "classify" else ("text",)

    def read(folder: Path) -> object:
        shard = SourceFile(kind, folder / name, lambda raw: {"text": raw.decode()})
        return sum(len(values[0]) for values in documents(shard, given, fields, []))

    return read


def written(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(raw)


LINES = "".join(
    json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(TEXTS)
).encode()
TABLE = ("text,label\n" + "".join(f'"{text}",{i % 2}\n' for i, text in enumerate(TEXTS))).encode()
FRAMED = b"".join(len(t).to_bytes(8, "little") + b"????" + t.encode() + b"????" for t in TEXTS)


def parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    table = pyarrow.table({"text": TEXTS * 3, "label": range(36)})
    pq.write_table(table, folder / "a.parquet", row_group_size=9, compression="zstd")


def zstd(folder: Path) -> None:
    import pyarrow

    (folder / "a").write_bytes(pyarrow.compress(LINES, codec="zstd", asbytes=True))


def tokens(folder: Path) -> None:
    write_jsonl(folder.parent / "a.jsonl", [{"text": text} for text in TEXTS])
    prepare(f"jsonl:{folder.parent}/a.jsonl", folder, quiet=True)
    (folder / ".lock").unlink()


def ids(folder: Path) -> None:
    for name in ("train", "val"):
        write_tokens(folder / f"{name}.bin", np.arange(500) % 300)


def batches(folder: Path) -> object:
    found = load(DataConfig(source=f"bin:{folder}"), batch_size=4, sequence_length=8, seed=0)
    return found.batch(0), next(found.heldout()), found.decode(found.batch(1).inputs[0])


def part(folder: Path) -> object:
    return token_writer.done(folder / "00000", np.dtype(np.uint8))


def half_prepared(folder: Path) -> None:
    path = write_jsonl(folder.parent / "a.jsonl", [{"text": text} for text in TEXTS])
    shard, bytes_ = SourceFile("jsonl", path), tokenizers.load("bytes")
    token_writer.write(
        shard, ("text",), bytes_, DataConfig(), folder / "00000", lambda tokens: None
    )


def trained(kind: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = write_jsonl(folder.parent / "a.jsonl", [{"text": text} for text in TEXTS])
        train_tokenizer(f"jsonl:{path}", folder / "tokenizer.json", 290, kind)

    return make


def unigram(folder: Path) -> None:
    import tokenizers as library

    model = library.Tokenizer(library.models.Unigram())
    model.pre_tokenizer = library.pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = library.trainers.UnigramTrainer(
        vocab_size=60, unk_token="<unk>", special_tokens=special, show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    model.save(str(folder / "tokenizer.json"))


def gpt2(folder: Path) -> None:
    from train.data.tokenizers.gpt2 import byte_characters

    names = [*byte_characters().values(), "so", "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\ns o\n")


def vocabulary(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "so", "it", "##es", "go"]
    (folder / "vocab.txt").write_text("\n".join(words))


def spelled(folder: Path) -> object:
    found = tokenizers.load(str(folder))
    known = found.encode("so it goes <s> <|endoftext|> é☃")
    some = np.arange(min(found.vocab_size, 500))
    return found.decode(known), [found.decode(some[i : i + 1]) for i in some]


MODELS = {
    "gpt2": models.DecoderConfig(vocab_size=19, context=8, width=8, layers=1, heads=2),
    "bert": models.EncoderConfig(vocab_size=19, context=8, width=8, layers=1, heads=2),
}


def hugging_face(kind: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        shape = MODELS[kind]
        params = models.split(shape).init(jax.random.key(0))
        huggingface.save(params, shape, folder)

    return make


def arrays(folder: Path) -> None:
    named = {"a": np.arange(12.0).reshape(3, 4), "b": np.arange(5, dtype=np.int32)}
    safetensors.write(folder / "a.safetensors", named)


def run_config(folder: Path) -> None:
    serialize.save(presets.preset("tiny", "sophia-g"), folder)


def rows(folder: Path) -> None:
    line = {"step": 1, "loss": 2.5, "tokens_per_second": 1e5, "heldout_loss": None}
    write_jsonl(folder / jsonl.FILE, [line | {"step": step} for step in range(9)])


STATE = {"params": {"a": jnp.arange(8.0), "b": jnp.ones((4, 4))}, "step": jnp.int32(1)}


def checkpoint(folder: Path) -> None:
    run = serialize.to_json(presets.preset("tiny", "adamw"))
    beside = {"step": 1, "config": run, "fingerprint": "x", "versions": manifest.versions()}
    with Checkpoints(folder) as kept:
        kept.save(1, STATE, manifest=beside | {"health": {"bad": 0}})


def restored(folder: Path) -> object:
    run = serialize.to_json(presets.preset("tiny", "adamw"))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), STATE)
    with Checkpoints(folder) as kept:
        return kept.restore(abstract, accept=lambda saved: manifest.check(saved, run, "x"))


READERS = {
    "jsonl": Reader(written("a.jsonl", LINES), text_of("jsonl", "a.jsonl")),
    "jsonl, skipping": Reader(
        written("a.jsonl", LINES), text_of("jsonl", "a.jsonl", broken="skip")
    ),
    "jsonl with classes": Reader(
        written("a.jsonl", LINES), text_of("jsonl", "a.jsonl", task="classify")
    ),
    "csv": Reader(written("a.csv", TABLE), text_of("csv", "a.csv")),
    "tsv": Reader(
        written("a.tsv", TABLE.replace(b",", b"\t").replace(b'"', b"")), text_of("tsv", "a.tsv")
    ),
    "text": Reader(written("a.txt", LINES), text_of("text", "a.txt", separator="so")),
    "utf-16": Reader(written("a.txt", LINES.decode().encode("utf-16")), text_of("text", "a.txt")),
    "gzip": Reader(written("a.gz", gzip.compress(LINES)), text_of("jsonl", "a.gz")),
    "xz": Reader(written("a.xz", lzma.compress(LINES)), text_of("jsonl", "a.xz")),
    "zstd": Reader(zstd, text_of("jsonl", "a")),
    "parquet": Reader(parquet, text_of("parquet", "a.parquet")),
    "tfds": Reader(written("a.tfrecord", FRAMED), text_of("tfds", "a.tfrecord")),
    "token folder": Reader(tokens, batches, "*.*"),
    "header": Reader(tokens, read_header, "header.json", limit=LARGEST),
    "ids alone": Reader(ids, batches),
    "part": Reader(half_prepared, part, "*.json", limit=LARGEST),
    "BPE": Reader(trained("bpe"), spelled, limit=LARGEST),
    "WordPiece": Reader(trained("wordpiece"), spelled, limit=LARGEST),
    "Unigram": Reader(unigram, spelled, limit=LARGEST),
    "GPT-2's tokenizer": Reader(gpt2, spelled, limit=LARGEST),
    "vocab.txt": Reader(vocabulary, spelled, limit=LARGEST),
    "safetensors": Reader(arrays, lambda folder: safetensors.read(folder / "a.safetensors")),
    "GPT-2": Reader(hugging_face("gpt2"), huggingface.load, limit=LARGEST),
    "BERT": Reader(hugging_face("bert"), huggingface.load, limit=LARGEST),
    "run config": Reader(run_config, serialize.load, limit=LARGEST),
    "metrics": Reader(rows, jsonl.read_history),
    "checkpoint": Reader(checkpoint, restored, "1/**/*", also="subject: step 1"),
}


@pytest.fixture(scope="module", params=READERS)
def subject(request, tmp_path_factory):
    """A reader, its folder, and the contents of the files that may be damaged."""
    name, reader = request.param, READERS[request.param]
    folder = tmp_path_factory.mktemp("fuzz") / "subject"
    folder.mkdir()
    reader.make(folder)
    reader.read(folder)  # what is whole is read, with its libraries imported
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    chosen = sorted(path for path in folder.glob(reader.files) if path in whole)
    assert chosen
    return name, reader, folder, whole, chosen


def test_what_is_damaged_is_read_or_named(subject, request):
    name, reader, folder, whole, chosen = subject
    seed = request.config.getoption("--fuzz-seed")
    count = -(-request.config.getoption("--fuzz") // len(READERS))
    faults = []
    for number in range(count):
        draw = random.Random(f"{seed} {name} {number}")
        path = draw.choice(chosen)
        restore(folder, whole)
        path.write_bytes(damaged(path.name, whole[path], draw))
        names = {path.name for path in whole} | ({reader.also} - {""})
        fault = judged(reader, folder, names)
        if fault:
            faults.append(f"seed {seed}, {name} {number}, {path.name}: {fault}")
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults[:20])


def restore(folder: Path, whole: dict[Path, bytes]) -> None:
    """Puts all files back, and removes what reading made."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in whole:
            path.unlink()
    for path, raw in whole.items():
        if not path.is_file() or path.read_bytes() != raw:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)


def judged(reader: Reader, folder: Path, names: set[str]) -> str:
    """What is wrong with how a reader takes a file; empty for nothing."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    before = memory("VmRSS", reset=True)
    try:
        reader.read(folder)
    except ERRORS as error:
        if not any(name in str(error) for name in names):
            return f"no file is named by {type(error).__name__}: {str(error)[:300]}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return f"{type(error).__name__} at {place}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = memory("VmHWM") - before
    return f"{grown / 2**20:.0f} MB were taken" if grown > ALLOWED + 2 * reader.limit else ""


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def test_the_same_seed_damages_in_the_same_way():
    raw = json.dumps({"a": [1, 2, {"b": "c"}]}).encode()
    made = [damaged("a.json", raw, random.Random(f"0 {i}")) for i in range(50)]
    assert made == [damaged("a.json", raw, random.Random(f"0 {i}")) for i in range(50)]
    assert len(set(made)) > 30 and made != [
        damaged("a.json", raw, random.Random(f"1 {i}")) for i in range(50)
    ]


@pytest.mark.parametrize("wrong", [KeyError("x"), OSError("x"), ValueError("no name")])
def test_another_error_or_one_without_the_file_is_seen(tmp_path, wrong):
    def read(folder):
        raise wrong

    assert judged(Reader(gpt2, read), tmp_path, {"encoder.json"})
    assert not judged(Reader(gpt2, lambda folder: None), tmp_path, {"encoder.json"})


def test_memory_that_is_taken_is_seen(tmp_path):
    reader = Reader(gpt2, lambda folder: np.ones(2**24).sum(), limit=0)  # 128 MB, given back
    assert "MB were taken" in judged(reader, tmp_path, set()) or not memory("VmHWM")


def test_files_of_every_kind_are_damaged():
    assert set(KINDS) - {"embedded", "bin"} == set(document_readers.READERS) <= set(READERS)
