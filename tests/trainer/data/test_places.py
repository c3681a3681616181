"""Where data is: literal paths, absolute sources, addresses, and token folders without flags."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
from corpora import DOCUMENTS, loader, write_jsonl, write_tokens

from train.config import presets
from train.data import DataConfig, paths, resolved, source_string
from train.data.prepare.header import write_header
from train.data.prepare.prepare import prepare
from train.data.prepare.train_tokenizer import train_tokenizer

NAMES = ["data[1].txt", "x [v1]/a.txt", "a*b.txt", "what?.txt", "[!a].txt", "back\\slash.txt", "**"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_exists_is_taken_literally(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("so it goes " * 99)
    (tmp_path / "data1.txt").write_text("other")  # what the patterns would match
    (tmp_path / "aXb.txt").write_text("other")
    assert paths.files_of(str(path)) == [path]
    loader(tmp_path)(f"text:{path}").batch(0)


def test_what_does_not_exist_is_a_glob_in_a_folder_that_is_taken_literally(tmp_path, monkeypatch):
    for folder in ("x [v1]", "x [v2]", "x v"):
        (tmp_path / folder / "in").mkdir(parents=True)
        for name in ("1.txt", "2.txt", "3.md"):
            (tmp_path / folder / "in" / name).touch()
    inner = tmp_path / "x [v1]"
    want = [inner / "in/1.txt", inner / "in/2.txt"]
    assert paths.files_of(f"{inner}/**/*.txt") == want
    assert paths.files_of(f"{inner}/in/[12].*") == want
    assert len(paths.files_of(f"{tmp_path}/x*/in/1.txt")) == 3
    monkeypatch.chdir(inner)
    assert paths.files_of("in/?.txt") == want


def test_absolute_sources_mean_the_same_from_anywhere_and_keep_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()
    for source, want in {
        "embedded": "embedded",
        "tfds:glue/sst2:train": "tfds:glue/sst2:train",
        "text:a/*.txt": f"text:{here}/a/*.txt",
        "text:/a/[1].txt": "text:/a/[1].txt",
        "bin:~/a": f"bin:{os.path.expanduser('~')}/a",
        "bin:a:0.70,tfds:lm1b:.2,embedded:.1": f"bin:{here}/a:0.70,tfds:lm1b:.2,embedded:.1",
        "text:a,b.txt": f"text:{here}/a,b.txt",
        "": "",
    }.items():
        assert source_string.absolute(source) == want
        assert source_string.absolute(want) == want


def test_a_run_is_recorded_with_absolute_places_and_the_same_fingerprint(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text.upper()} for text in DOCUMENTS])
    train_tokenizer(f"jsonl:{tmp_path}/a.jsonl", tmp_path / "t.json", 300)
    monkeypatch.chdir(tmp_path)
    small = loader(tmp_path)
    config = {"tokenizer": "t.json", "heldout_source": "jsonl:b.jsonl"}
    relative = small("jsonl:a.jsonl:0.5,jsonl:b.jsonl:0.5", **config)
    found = resolved(DataConfig(source="jsonl:a.jsonl:0.5,jsonl:b.jsonl:0.5", **config))
    assert found == resolved(found)
    monkeypatch.chdir("/")
    assert found.tokenizer == f"{tmp_path}/t.json"
    again = small(found.source, tokenizer=found.tokenizer, heldout_source=found.heldout_source)
    assert again.fingerprint == relative.fingerprint


@pytest.mark.parametrize("source", ["text:none/*.txt", "jsonl:none.jsonl", "bin:none", "csv:a[1]"])
def test_what_is_missing_is_named_by_the_place_that_was_looked_at(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{source.partition(':')[2]}")):
        loader(tmp_path)(source)


@pytest.mark.parametrize(
    "source",
    [
        "text:gs://bucket/a.txt",
        "gs://bucket/a",
        "bin:s3://bucket/a",
        "parquet:https://host/a.parquet",
        "text:file:///a.txt",
        "embedded:0.5,bin:hdfs://a/b:0.5",
    ],
)
def test_an_address_is_refused_before_anything_is_done(tmp_path, source):
    with pytest.raises(ValueError, match="is an address, not a path of this machine"):
        DataConfig(source=source)
    with pytest.raises(ValueError, match="is an address, not a path of this machine"):
        DataConfig(heldout_source=source)
    with pytest.raises(ValueError, match="is an address, not a path of this machine"):
        prepare(source, tmp_path / "out", quiet=True)
    assert not any(tmp_path.iterdir())


def test_other_places_are_no_addresses_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer", "cache", "tfds_folder"):
        with pytest.raises(ValueError, match=rf"data\.{name} gs://a is an address"):
            DataConfig(**{name: "gs://a"})
    with pytest.raises(ValueError, match="-o gs:/bucket is an address"):
        prepare("embedded", Path("gs://bucket"), quiet=True)
    with pytest.raises(ValueError, match=r"-o s3:/b/t\.json is an address"):
        train_tokenizer("embedded", Path("s3://b/t.json"))
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_its_tokenizer_needs_no_flag(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])
    config = DataConfig(tokenizer=str(train_tokenizer(f"jsonl:{path}", tmp_path / "t.json", 300)))
    prepare(f"jsonl:{path}", tmp_path / "out", config, quiet=True)
    (tmp_path / "t.json").unlink()
    found = loader(tmp_path)(f"bin:{tmp_path}/out")
    assert "so it goes" in found.decode(found.batch(0).inputs.ravel())
    assert found.vocab_size > 256
    (tmp_path / "out/tokenizer/tokenizer.json").rename(tmp_path / "t.json")
    with pytest.raises(
        ValueError, match=r"out/header\.json names the tokenizer .* copy the folder"
    ):
        loader(tmp_path)(f"bin:{tmp_path}/out")
    loader(tmp_path)(f"bin:{tmp_path}/out", tokenizer=str(tmp_path / "t.json")).batch(0)
    prepare(f"jsonl:{path}", tmp_path / "bytes", quiet=True)
    assert loader(tmp_path)(f"bin:{tmp_path}/bytes").vocab_size == 256


def ids(folder, dtype, largest=50_256):
    """A folder as nanoGPT's prepare.py leaves it."""
    folder.mkdir()
    tokens = np.random.default_rng(0).zipf(1.3, 5000) % (largest + 1)
    tokens[[100, 4500]] = largest
    write_tokens(folder / "train.bin", tokens[:4000], dtype)
    write_tokens(folder / "val.bin", tokens[4000:], dtype)
    return tokens


@pytest.mark.parametrize(("dtype", "largest"), [("uint16", 50_256), ("uint32", 150_000)])
def test_ids_alone_are_tokens_of_a_vocabulary_up_to_the_largest(tmp_path, dtype, largest):
    tokens = ids(tmp_path / "nano", dtype, largest)
    found = loader(tmp_path)(f"bin:{tmp_path}/nano", batch_size=16)
    assert found.vocab_size == largest + 1 and found.tokenizer.name == f"ids:{largest + 1}"
    np.testing.assert_array_equal(next(found.heldout()).targets[0], tokens[4001:4017])
    assert found.bytes_per_token is None
    shown = found.decode(found.prompt("HAMLET."))
    assert shown == " ".join(map(str, tokens[4000:4008]))
    assert found.encode("15 7").tolist() == [15, 7]
    for text in ("fifteen", str(largest + 1), "-1", "1.5"):
        with pytest.raises(ValueError, match=rf"not made of ids from 0 to {largest}"):
            found.encode(text)
    one = write_tokens(tmp_path / "one.bin", tokens, dtype)
    assert loader(tmp_path)(f"bin:{one}").vocab_size == largest + 1


def test_ids_alone_of_several_sources_are_of_the_largest_vocabulary(tmp_path):
    for name, largest in (("a", 300), ("b", 700), ("c", 500)):
        ids(tmp_path / name, "uint16", largest)
    mixed = DataConfig(source=f"bin:{tmp_path}/a:1,bin:{tmp_path}/b:1")
    assert resolved(mixed).tokenizer == "ids:701"
    judged = DataConfig(source=f"bin:{tmp_path}/a", heldout_source=f"bin:{tmp_path}/c")
    assert resolved(judged).tokenizer == "ids:501"


def test_bytes_of_two_are_not_taken_for_halves_of_four(tmp_path):
    folder = tmp_path / "characters"
    ids(folder, "uint16", largest=64)
    found = loader(tmp_path)(f"bin:{folder}")
    assert found.vocab_size == 65 and found.rows.heldout_count == 999 // 16


def test_what_ids_alone_cannot_do_is_refused(tmp_path):
    ids(tmp_path / "nano", "uint16")
    small = loader(tmp_path)
    with pytest.raises(ValueError, match=r"segments needs the token that ends a document"):
        small(f"bin:{tmp_path}/nano", segments=True)
    with pytest.raises(ValueError, match=r"no \[MASK\] token"):
        small(f"bin:{tmp_path}/nano", task="masked")
    (tmp_path / "nano/val.bin").unlink()
    with pytest.raises(ValueError, match=r"has no header\.json: .* train\.bin and val\.bin"):
        small(f"bin:{tmp_path}/nano")


def test_an_id_beyond_the_stated_vocabulary_is_named_with_its_file_and_place(tmp_path):
    ids(tmp_path / "nano", "uint16")
    small = loader(tmp_path)
    stated = {"tokenizer": "ids:50256", "batch_size": 300}
    message = r"nano/{} holds token 50256, outside a vocabulary of 50256, at position {}"
    with pytest.raises(
        ValueError, match=message.format("val.bin", 500)
    ):  # 4500 of all, 500 of val.bin
        small(f"bin:{tmp_path}/nano", **stated)
    tokens = np.fromfile(tmp_path / "nano/val.bin", np.uint16)
    np.minimum(tokens, 9).tofile(tmp_path / "nano/val.bin")
    with pytest.raises(ValueError, match=message.format("train.bin", 100)):
        small(f"bin:{tmp_path}/nano", **stated).batch(0)


def test_a_header_of_an_older_count_of_tokens_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])
    header = prepare(f"jsonl:{path}", tmp_path / "out", quiet=True)
    header["tokenizer"]["vocab_size"] = 200
    write_header(tmp_path / "out", header)
    with pytest.raises(ValueError, match=r"counted 200 tokens where .* prepare the data again"):
        loader(tmp_path)(f"bin:{tmp_path}/out")


def test_a_run_on_ids_alone_fits_its_vocabulary_and_prints_ids(tmp_path, monkeypatch):
    from train import loop
    from train.config import serialize

    ids(tmp_path / "nano", "uint16", largest=300)
    monkeypatch.chdir(tmp_path)
    run = presets.preset("tiny", "adamw")
    model = dataclasses.replace(run.model, layers=1, width=16, heads=2, context=16)
    run = dataclasses.replace(
        run,
        model=model,
        data=DataConfig(source="bin:nano"),
        output=dataclasses.replace(run.output, folder="run", sample_length=9, compile_cache=""),
        steps=2,
        warmup_steps=1,
        batch_size=8,
        sequence_length=8,
    )
    history = loop.train(run)
    assert history[-1]["heldout_loss"] > 0 and "bits_per_byte" not in history[-1]
    made = serialize.load(tmp_path / "run")
    assert made.model.vocab_size == 301 and made.data.tokenizer == "ids:301"
    assert made.data.source == f"bin:{tmp_path}/nano"
    words = (tmp_path / "run/sample.txt").read_text().split()
    assert len(words) == 8 + 9 and all(int(word) < 301 for word in words)
