"""`prepare`: what it writes, that it goes on where it stopped, and the tokenizers it uses."""

import errno
import fcntl
import hashlib
import os
import threading

import numpy as np
import pytest
from corpora import DOCUMENTS, loader, tiny_gpt2, write_jsonl

from train import lock
from train.data import DataConfig, tokenizers
from train.data.prepare import token_writer
from train.data.prepare.header import read_header
from train.data.prepare.prepare import prepare, request_hash
from train.data.prepare.records import Broken, SourceFile
from train.data.prepare.train_tokenizer import train_tokenizer

END = tokenizers.load("bytes").end


def documents_of(path):
    pieces = np.fromfile(path, np.uint8).tobytes().split(bytes([END]))
    assert pieces.pop() == b""  # the last one ends too
    return [piece.decode() for piece in pieces]


def test_every_document_is_kept_once_on_the_side_of_its_hash(files, tmp_path):
    header = prepare(files, tmp_path / "out", DataConfig(heldout_fraction=0.2), quiet=True)
    train, heldout = (documents_of(tmp_path / "out" / f"{s}.bin") for s in ("train", "heldout"))
    want = [
        [d for d in DOCUMENTS if token_writer.held_out(d.encode(), 0.2) == side] for side in (0, 1)
    ]
    assert [train, heldout] == want and 20 < len(heldout) < 60
    assert header["heldout"] == "documents by hash"
    for name, kept in (("train", train), ("heldout", heldout)):
        split = header["splits"][name]
        assert split["documents"] == len(kept) and split["bytes"] == sum(map(len, kept))
        raw = (tmp_path / "out" / f"{name}.bin").read_bytes()
        assert split["tokens"] == len(raw) == split["bytes"] + len(kept)
        assert split["sha256"] == hashlib.sha256(raw).hexdigest()
        assert split["largest"] == max(raw)
    found = loader(tmp_path)(f"bin:{tmp_path / 'out'}")
    kept = header["splits"]["heldout"]
    assert found.bytes_per_token == pytest.approx(kept["bytes"] / kept["tokens"])


def test_copies_of_a_document_are_on_one_side(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": d + end} for end in "\n \t" for d in DOCUMENTS]
    )
    prepare(f"jsonl:{path}", tmp_path / "out", DataConfig(heldout_fraction=0.3), quiet=True)
    sides = [
        {d.strip() for d in documents_of(tmp_path / "out" / f"{s}.bin")}
        for s in ("train", "heldout")
    ]
    assert all(sides) and not sides[0] & sides[1]


def test_of_one_document_the_end_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("".join(DOCUMENTS))
    header = prepare(f"text:{tmp_path / 'a.txt'}", tmp_path / "out", quiet=True)
    assert header["heldout"] == "tail"
    whole = b"".join((tmp_path / "out" / f"{s}.bin").read_bytes() for s in ("train", "heldout"))
    assert whole == "".join(DOCUMENTS).encode() + bytes([END])
    tokens = header["splits"]["heldout"]["tokens"]
    assert tokens == round(0.05 * len(whole)) == (tmp_path / "out/heldout.bin").stat().st_size


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_finished_is_not_done_again_and_the_result_is_the_same(
    files, tmp_path, monkeypatch, workers
):
    want = prepare(files, tmp_path / "whole", quiet=True)
    write, done = token_writer.write, []

    def fails_at_the_third(shard, *args):
        if shard.path.name == "2.jsonl":
            raise OSError("no space left")
        done.append(shard.path.name)
        return write(shard, *args)

    monkeypatch.setattr(token_writer, "write", fails_at_the_third)
    with pytest.raises(OSError, match="no space left"):
        prepare(files, tmp_path / "out", quiet=True, workers=workers)
    assert read_header(tmp_path / "out") is None  # not complete, and not taken for it
    with pytest.raises(ValueError, match=r"no header\.json"):
        loader(tmp_path)(f"bin:{tmp_path / 'out'}")
    again = []
    monkeypatch.setattr(
        token_writer, "write", lambda shard, *a: (again.append(shard), write(shard, *a))[1]
    )
    got = prepare(files, tmp_path / "out", quiet=True, workers=workers)
    finished = {name for name in done if name not in {s.path.name for s in again}}
    assert len(again) + len(finished) == 4 and (finished or workers > 1)
    assert got["splits"] == want["splits"]
    for name in ("train.bin", "heldout.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out/parts").exists()
    monkeypatch.setattr(token_writer, "write", None)
    assert (
        prepare(files, tmp_path / "out", quiet=True) == got
    )  # a third time there is nothing to do


def test_a_folder_of_something_else_is_left_alone(files, tmp_path):
    prepare(files, tmp_path / "out", quiet=True)
    before = (tmp_path / "out/train.bin").read_bytes()
    with pytest.raises(ValueError, match="prepared with other settings or from"):
        prepare(files, tmp_path / "out", DataConfig(heldout_fraction=0.3), quiet=True)
    write_jsonl(tmp_path / "0.jsonl", [{"text": "other"}])
    with pytest.raises(ValueError, match="prepared with other settings or from"):
        prepare(files, tmp_path / "out", quiet=True)
    assert (tmp_path / "out/train.bin").read_bytes() == before
    bad = tmp_path / "9.jsonl"
    bad.write_text("{")
    for name, message in ((bad, "line 1"), (tmp_path / "0.jsonl", "unfinished preparation")):
        with pytest.raises(ValueError, match=message):
            prepare(f"jsonl:{name}", tmp_path / "half", quiet=True)


def test_two_processes_at_one_folder_wait_for_each_other(files, tmp_path):
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(prepare(files, tmp_path / "out", quiet=True))
        )
        for _ in range(3)
    ]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert len(results) == 3 and results[0] == results[1] == results[2]


def test_prepare_waits_for_who_holds_the_folder_and_says_so(files, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with lock.hold(out):
        thread = threading.Thread(target=lambda: prepare(files, out))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and read_header(out) is None
    thread.join(30)
    assert read_header(out)
    said = " ".join(capsys.readouterr().err.split())
    assert f"waiting for process {os.getpid()} on" in said


def test_a_file_system_without_locks_is_prepared_in(files, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert prepare(files, tmp_path / "out", quiet=True)["splits"]["train"]["tokens"]


def test_what_marks_work_as_done_is_on_the_disk_and_written_through_no_link(
    files, tmp_path, monkeypatch
):
    sync, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(handle) or sync(handle))
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out/parts").mkdir(parents=True)
    for name in ("train.bin", "heldout.bin", "parts/00000.train", "parts/00003.json"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    prepare(files, tmp_path / "out", quiet=True)
    assert (tmp_path / "precious").read_text() == "mine"
    # Each file before its name in the folder: the request, four parts of three, two token files
    # and the header.
    assert len(synced) == 2 * (1 + 4 * 3 + 2 + 1)


def test_tokens_of_another_tokenizer_are_refused_and_the_cure_works(files, tmp_path):
    pytest.importorskip("tiktoken", reason="the extra data is not installed")
    config = DataConfig(tokenizer=str(tiny_gpt2(tmp_path / "gpt2")))
    prepare(files, tmp_path / "out", config, quiet=True)
    small = loader(tmp_path)
    other = train_tokenizer(files, tmp_path / "other.json", 300)
    with pytest.raises(ValueError, match="prepared with another tokenizer") as error:
        small(f"bin:{tmp_path / 'out'}", tokenizer=str(other))
    cure = str(error.value).rpartition("--data.tokenizer ")[2].rstrip(".")
    found = small(f"bin:{tmp_path / 'out'}", tokenizer=cure)
    assert found.vocab_size == 261
    assert found.fingerprint != small(files).fingerprint
    assert "so it goes" in found.decode(found.batch(0).inputs.ravel())


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_trained_tokenizer_reads_its_text_back(files, tmp_path, kind):
    pytest.importorskip("tokenizers", reason="the extra data is not installed")
    path = train_tokenizer(files, tmp_path / kind / "tokenizer.json", 300, kind)
    found = tokenizers.load(str(path))
    text = "document 7: so it goes so it goes"
    assert found.decode(found.encode(text)).replace(" :", ":") == text
    assert len(found.encode(text)) < len(text) / 2 and 40 < found.vocab_size <= 300
    task = {"bpe": "next-token", "wordpiece": "masked"}[kind]
    batch = loader(tmp_path)(files, tokenizer=str(path), task=task).batch(0)
    if kind == "wordpiece":
        assert found.decode(batch.targets[0, [0, -1]]) == "[CLS] [SEP]"
    else:
        with pytest.raises(ValueError, match=r"no \[MASK\] token"):
            loader(tmp_path)(files, tokenizer=str(path), task="masked")
    with pytest.raises(ValueError, match=r"must end in \.json"):
        train_tokenizer(files, tmp_path / "tokenizer", 300, kind)


@pytest.mark.parametrize("name", ["bpe.json", "words.txt"])
def test_a_prepared_folder_names_its_tokenizer_whatever_that_was_called(files, tmp_path, name):
    pytest.importorskip("tokenizers", reason="the extra data is not installed")
    path = tmp_path / name
    if path.suffix == ".json":
        train_tokenizer(files, path, 300)
    else:
        path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nso\nit\ngoes")
    prepare(files, tmp_path / "out", DataConfig(tokenizer=str(path)), quiet=True)
    path.unlink()
    loader(tmp_path)(f"bin:{tmp_path}/out", tokenizer=str(tmp_path / "out/tokenizer")).batch(0)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"train": 3}', "short", "long"])
def test_a_part_whose_counts_or_tokens_are_damaged_is_made_again(
    files, tmp_path, monkeypatch, damage
):
    want, write = prepare(files, tmp_path / "whole", quiet=True), token_writer.write

    def fails_at_the_third(shard, *args):
        if shard.path.name == "2.jsonl":
            raise OSError("no space left")
        return write(shard, *args)

    monkeypatch.setattr(token_writer, "write", fails_at_the_third)
    with pytest.raises(OSError, match="no space left"):
        prepare(files, tmp_path / "out", quiet=True, workers=1)
    monkeypatch.setattr(token_writer, "write", write)
    part = tmp_path / "out/parts/00000"
    if damage in ("short", "long"):
        tokens = part.with_suffix(".train").read_bytes()
        part.with_suffix(".train").write_bytes(tokens[:-1] if damage == "short" else tokens * 2)
    else:
        part.with_suffix(".json").write_text(damage)
    assert prepare(files, tmp_path / "out", quiet=True)["splits"] == want["splits"]


def test_an_interrupt_stops_the_other_files(files, tmp_path, monkeypatch):
    write = token_writer.write

    def interrupted(shard, *args):
        if shard.path.name == "0.jsonl":
            raise KeyboardInterrupt
        return write(shard, *args)

    monkeypatch.setattr(token_writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(files, tmp_path / "out", quiet=True, workers=1)
    assert not isinstance(KeyboardInterrupt(), Broken)
    assert read_header(tmp_path / "out") is None


def test_the_command_line_takes_both_functions(files, tmp_path):
    tyro = pytest.importorskip("tyro", reason="the extra train is not installed")
    args = [files, "-o", str(tmp_path / "out"), "--data.heldout-fraction", "0.2", "--quiet"]
    header = tyro.cli(prepare, args=args)
    assert header == prepare(files, tmp_path / "out", DataConfig(heldout_fraction=0.2), quiet=True)
    pytest.importorskip("tokenizers", reason="the extra data is not installed")
    path = tmp_path / "tokenizer.json"
    args = [files, "-o", str(path), "--vocab-size", "300", "--kind", "wordpiece"]
    assert tyro.cli(train_tokenizer, args=args) == path and path.is_file()


def test_the_kind_of_a_source_is_part_of_what_was_prepared(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "a line\n" * 50)
    prepare(f"csv:{path}", tmp_path / "out", DataConfig(), quiet=True)
    with pytest.raises(ValueError, match=r"out holds csv:.*prepared with other"):
        prepare(f"text:{path}", tmp_path / "out", DataConfig(), quiet=True)


def test_a_table_of_a_header_alone_has_no_documents(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="the source has no documents\\."):
        prepare(f"csv:{tmp_path}/a.csv", tmp_path / "out", DataConfig(), quiet=True)
    with pytest.raises(ValueError, match="--workers -1 is negative"):
        prepare(f"csv:{tmp_path}/a.csv", tmp_path / "out", DataConfig(), workers=-1, quiet=True)


def test_folders_with_brackets_are_printed_as_they_are(tmp_path, capsys):
    """Which rich would take for markup, and `[/x]` for its end."""
    (tmp_path / "[/x]").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("to be or not " * 90)
    prepare(f"text:{tmp_path}/a.txt", tmp_path / "[/x]" / "[lr=.01]")
    assert f"{tmp_path}/[/x]/[lr=.01]: " in capsys.readouterr().err


def test_which_documents_are_held_out_never_changes():
    """A run that goes on under another version must find its data as it was."""
    held = [i for i in range(40) if token_writer.held_out(f"document {i}".encode(), 0.2)]
    assert held == [15, 26, 27, 36, 37]
    assert sum(token_writer.held_out(str(i).encode(), 0.2) for i in range(1000)) == 181


def test_a_file_that_was_written_again_is_another_request(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "so it goes"}])
    file, tokenizer = SourceFile("jsonl", path), tokenizers.load("bytes")
    hash_of = lambda: request_hash([file], ("text",), tokenizer, DataConfig())  # noqa: E731
    os.utime(path, ns=(10**18, 10**18))
    before = hash_of()
    assert hash_of() == before
    os.utime(path, ns=(10**18, 10**18 + 10**6))
    assert hash_of() != before
