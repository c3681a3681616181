"""What may be wrong with data: each fault is an error that names file and cure, or is counted."""

import gzip
import json
import re

import numpy as np
import pytest
from corpora import DOCUMENTS, loader, write_jsonl, write_tokens
from places import ROOT

from train.data import DataConfig, load
from train.data.prepare.documents import documents
from train.data.prepare.prepare import prepare
from train.data.prepare.records import Broken, SourceFile
from train.data.source_string import parse_mixture

LINES = [json.dumps({"text": text}) for text in DOCUMENTS]


def jsonl(folder, *lines, name="a.jsonl"):
    path = folder / name
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    return path


BROKEN_LINES = {
    "broken JSON": ('{"text": "so it g', r"line 3: broken JSON"),
    "too deep": ("[" * 100_000, r"line 3: broken JSON"),
    "not UTF-8": (b'{"text": "caf\xe9"}', r"line 3: byte 13 \(0xe9\) is not UTF-8; .*iconv"),
    "no object": ("[1]", r"line 3: \[1\] is not a JSON object"),
    "no such field": (
        '{"body": "x"}',
        r"line 3: no field 'text'; there are body .*--data.text-field",
    ),
    "a number": ('{"text": 3}', r"line 3: field 'text' holds 3, which is not text"),
    "null": ('{"text": null}', r"line 3: field 'text' holds None, which is not text"),
    "half a pair": ('{"text": "\\ud800"}', r"line 3: character 0 is half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_a_broken_line_is_named_or_passed_over_and_counted(tmp_path, name):
    line, message = BROKEN_LINES[name]
    path = jsonl(tmp_path, *LINES[:2], line, *LINES[2:])
    with pytest.raises(Broken, match=rf"a\.jsonl, {message}.*--data\.broken skip"):
        loader(tmp_path)(f"jsonl:{path}")
    header = prepare(f"jsonl:{path}", tmp_path / "out", DataConfig(broken="skip"), quiet=True)
    assert header["skipped"]["count"] == 1
    assert re.search(message, header["skipped"]["first"][0])
    assert sum(split["documents"] for split in header["splits"].values()) == len(LINES)


def test_a_source_that_is_all_broken_says_why(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in DOCUMENTS])
    with pytest.raises(ValueError, match=r"no documents; skipped 200, first .*no field 'text'"):
        loader(tmp_path)(f"jsonl:{path}", broken="skip")


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "parquet"])
def test_an_empty_file_is_refused(tmp_path, kind):
    (tmp_path / f"none.{kind}").touch()
    with pytest.raises(Broken, match=rf"none\.{kind} is empty"):
        loader(tmp_path)(f"{kind}:{tmp_path / 'none'}.{kind}")


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(Broken, match=r"a\.txt: byte 3 \(0xe9\) is not UTF-8"):
        loader(tmp_path)(f"text:{tmp_path / 'a.txt'}")


def test_documents_have_a_limit_whatever_they_are_packed_into(tmp_path):
    small = loader(tmp_path)
    bomb = tmp_path / "a.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"text": "' + b"x" * 10**6 + b'"}'))
    with pytest.raises(Broken, match=r"line 1: a line of more than --data.document-limit 9"):
        small(f"jsonl:{bomb}", document_limit=99)
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(Broken, match=r"a\.txt: a document has more than .*--data.separator"):
        small(f"text:{tmp_path / 'a.txt'}", document_limit=99)
    arrow, path = pytest.importorskip("pyarrow", reason="extra data"), tmp_path / "a.parquet"
    import pyarrow.parquet as pq

    pq.write_table(arrow.table({"text": ["so", "x" * 100]}), path)
    with pytest.raises(Broken, match=r"group 0, row 1: 100 bytes, more than --data.docum"):
        small(f"parquet:{path}", document_limit=99)


def test_cells_and_lines_of_a_table_have_the_limit_too(tmp_path):
    for cell, message in (("x" * 100, "line 2: a line of more than"), ("x\n" * 60, "field larger")):
        (tmp_path / "a.csv").write_text(f'text\n"{cell}"\n')
        with pytest.raises(Broken, match=message):
            loader(tmp_path)(f"csv:{tmp_path / 'a.csv'}", document_limit=99)
    (tmp_path / "a.csv").write_bytes(b"text\nso\ncaf\xe9\n")
    with pytest.raises(Broken, match=r"a\.csv, line 3: byte 3 \(0xe9\) is not UTF-8"):
        loader(tmp_path)(f"csv:{tmp_path / 'a.csv'}")


LONG = b"x" * 99
BROKEN_TABLES = {
    "csv, not UTF-8": (b"one\ntw\xe9\nthree\nfour\n", "line 3: byte 2"),
    "csv, too long": (b"one\n" + LONG + b"\nthree\nfour", "line 3: a line of more"),
    "csv, too long at the end": (b"one\nthree\nfour\n" + LONG, "line 5: a line of more"),
    "csv, in a cell": (b'one\n"tw\xe9\ntwo"\nthree\nfour', "line 3: byte 3"),
    "csv, a bare CR": (b"one\nt\rwo\nthree\nfour", "line 3: new-line character"),
    "tsv, not UTF-8": (b"one\ntw\xe9\nthree\nfour\n", "line 3: byte 2"),
    "jsonl, too long": (
        b'{"text": "one"}\n' + LONG + b'\n{"text": "three"}\n{"text": "four"}',
        "line 2: a line of more",
    ),
    "text, too long": (b"one|" + LONG * 30_000 + b"|three|four", "a document has more"),
}


@pytest.mark.parametrize("name", BROKEN_TABLES)
def test_what_follows_a_broken_line_is_read(tmp_path, name):
    raw, message = BROKEN_TABLES[name]
    kind = name.partition(",")[0]
    path = tmp_path / "a"
    path.write_bytes(b"text\n" * (kind in ("csv", "tsv")) + raw)
    config = DataConfig(broken="skip", document_limit=60, separator="|")
    skipped = []
    found = documents(SourceFile(kind, path), config, ("text",), skipped)
    assert [text for (text,) in found] == ["one", "three", "four"]
    assert len(skipped) == 1 and message in skipped[0]


def test_a_table_whose_first_line_is_broken_has_no_rows(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"te\xe9xt\nso\n")
    skipped = []
    shard = SourceFile("csv", tmp_path / "a.csv")
    assert not [*documents(shard, DataConfig(broken="skip"), ("text",), skipped)]
    assert len(skipped) == 1 and "line 1: byte 2" in skipped[0]


def test_rows_of_a_table_that_are_too_short_or_too_long_are_named(tmp_path):
    for row, columns in (("so", 1), ("so\t0\t1", 3)):
        (tmp_path / "a.tsv").write_text(f'text\tlabel\nso it "goes\t0\n{row}\n')
        message = rf"a\.tsv, line 3: {columns} columns, but the first row has 2"
        with pytest.raises(Broken, match=message):
            loader(tmp_path)(f"tsv:{tmp_path / 'a.tsv'}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("jsonL:x", r"unknown source 'jsonL:x'\. Did you mean jsonl\?"),
        ("shakespeare", "unknown source .*embedded, or one of bin, text"),
        ("embedded:x", "should have no path: embedded"),
        ("text:", "should have a path: text:PATH"),
        ("text:{}/*.md", r"matches no file: give a file or a glob in quotes"),
        ("text:{}", r"is a folder: give a file or a glob"),
        ("bin:{}/none", "none does not exist: give a folder that `prepare` made"),
        ("bin:{}", r"has no header\.json: .*--data.headerless uint16"),
        ("embedded:0.5,bin:x", "give each source of a mixture a weight"),
        ("embedded:1,embedded:0.0001", "each must be above 0 and at least 0.001 of their sum"),
        ("embedded:1,embedded:0", "each must be above 0"),
    ],
)
def test_a_source_that_is_not_there_says_what_to_give(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        loader(tmp_path)(source.format(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "gpt2"}, "unknown tokenizer 'gpt2': give bytes, a folder with encoder.json"),
        ({"seed": -1}, "seed=-1 not negative"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"heldout_fraction": 0.0}, "heldout_fraction=0.0 leaves nothing"),
        ({"heldout_fraction": 1.0}, "heldout_fraction=1.0 leaves nothing"),
        ({"mask_rate": 0.0}, "mask_rate=0.0 is not a share"),
        ({"document_limit": 0}, "document_limit=0"),
        ({"task": "classify", "segments": True}, "has one text a row"),
        ({"task": "classify"}, "holds tokens, not documents"),
        ({"sequence_length": 10**7}, "the embedded text, train part: .*shorter sequence_length"),
        ({"heldout_fraction": 1e-5}, "heldout part: the text has 13 tokens .*heldout-fraction"),
    ],
)
def test_a_config_that_cannot_be_met_says_why(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loader(tmp_path)("embedded", **changes)


def test_a_held_out_part_that_is_too_short_is_named_with_a_cure_that_helps(tmp_path):
    small, out = loader(tmp_path), tmp_path / "out"
    (tmp_path / "short.txt").write_text("so it goes")
    short = f"text:{tmp_path / 'short.txt'}"
    with pytest.raises(ValueError, match=r"text:.*short\.txt, train part: .*shorter sequence_len"):
        small(short)
    with pytest.raises(ValueError, match=r"heldout part: .*; or give another --data.heldout-so"):
        small("embedded", heldout_source=short)
    prepare(short, out, quiet=True)
    with pytest.raises(ValueError, match=r"/out, heldout part: .*or give another --data.heldout"):
        small("embedded", heldout_source=f"bin:{out}")
    (tmp_path / "long.txt").write_text("so it goes " * 20)
    prepare(f"text:{tmp_path / 'long.txt'}", tmp_path / "long", quiet=True)
    with pytest.raises(ValueError, match=r"/long, heldout part: .*; or prepare it with a higher"):
        small(f"bin:{tmp_path / 'long'}", heldout_fraction=0.5)


@pytest.mark.parametrize("task", ["next-token", "masked"])
def test_a_held_out_token_beyond_the_vocabulary_is_looked_for_where_it_is(tmp_path, task):
    tokens = np.full(2**20 + 2**12, 65)  # its head is looked at when it is opened
    tokens[-1000:] = 300
    judge = write_tokens(tmp_path / "judge.bin", tokens)
    source = write_tokens(tmp_path / "a.bin", np.full(2000, 65))
    found = loader(tmp_path)(
        f"bin:{source}",
        heldout_source=f"bin:{judge}",
        headerless="uint16",
        task=task,
        batch_size=2**10,
        sequence_length=256,
    )
    found.batch(0)
    with pytest.raises(ValueError, match=r"judge\.bin holds token 300"):
        list(found.heldout())


def test_a_token_beyond_the_vocabulary_is_found_before_the_model_reads_it(tmp_path):
    tokens = np.full(2000, 65)
    tokens[700] = 300
    found = loader(tmp_path)(
        f"bin:{write_tokens(tmp_path / 'a.bin', tokens)}", headerless="uint16", batch_size=64
    )
    with pytest.raises(ValueError, match=r"a\.bin holds token 300, outside a vocabulary of 256"):
        [found.batch(step) for step in range(4)]
    tokens[-5] = 999
    with pytest.raises(ValueError, match="holds token 999, outside a vocabulary of 256"):
        loader(tmp_path)(f"bin:{write_tokens(tmp_path / 'a.bin', tokens)}", headerless="uint16")


def test_headerless_files_of_an_odd_size_are_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x" * 1001)
    with pytest.raises(ValueError, match="1001 bytes are not a whole number of uint16 tokens"):
        loader(tmp_path)(f"bin:{tmp_path / 'a.bin'}", headerless="uint16")
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"0 bytes are not a whole number of uint32 tokens; .*empty"
    ):
        loader(tmp_path)(f"bin:{tmp_path / 'a.bin'}", headerless="uint32")


def test_token_files_that_disagree_with_their_header_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])
    folder = tmp_path / "out"
    prepare(f"jsonl:{path}", folder, quiet=True)
    whole, header = (folder / "train.bin").read_bytes(), (folder / "header.json").read_text()
    for other in (whole[:-1], whole + b"x"):
        (folder / "train.bin").write_bytes(other)
        message = r"train\.bin has \d+ bytes, but its header counts \d+"
        with pytest.raises(ValueError, match=message):
            loader(tmp_path)(f"bin:{folder}")
    (folder / "train.bin").unlink()
    with pytest.raises(ValueError, match=r"train\.bin is missing"):
        loader(tmp_path)(f"bin:{folder}")
    (folder / "train.bin").write_bytes(whole)
    stated = json.loads(header)
    stated["splits"]["train"]["largest"] = 256  # one more than the largest byte
    (folder / "header.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=r"train\.bin has another largest token than header"):
        loader(tmp_path)(f"bin:{folder}")
    for broken in (header[:-9], header.replace("tokens 1", "tokens 9"), "[]", '{"format": 1}'):
        (folder / "header.json").write_text(broken)
        with pytest.raises(ValueError, match=r"header\.json is not a header that this version"):
            loader(tmp_path)(f"bin:{folder}")


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("headerless", ["", "uint16"])
def test_token_files_of_one_size_with_other_tokens_are_other_data(tmp_path, split, headerless):
    folder = tmp_path / "out"
    if headerless:
        folder.mkdir()
        for name in ("train", "val"):
            write_tokens(folder / f"{name}.bin", np.arange(999) % 99)
    else:
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])
        prepare(f"jsonl:{path}", folder, quiet=True)
    found = lambda: loader(tmp_path)(f"bin:{folder}", headerless=headerless)  # noqa: E731
    before = found().fingerprint
    assert found().fingerprint == before
    path = folder / f"{'val' if headerless and split == 'heldout' else split}.bin"
    np.fromfile(path, headerless or np.uint8)[::-1].tofile(path)
    assert found().fingerprint != before


def test_a_source_of_fewer_rows_than_a_batch_repeats_them(tmp_path):
    path = write_tokens(tmp_path / "a.bin", np.arange(60), np.uint16)
    found = loader(tmp_path)(f"bin:{path}", headerless="uint16", batch_size=5, heldout_fraction=0.3)
    assert len(np.unique(found.batch(0).inputs[:, 0])) < 5


@pytest.mark.parametrize("module", ["pyarrow", "tokenizers", "tiktoken"])
def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, module):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_text("x")
    (tmp_path / "tokenizer.json").write_text("x")
    (tmp_path / "vocab.bpe").write_text("x")
    (tmp_path / "encoder.json").write_text("x")
    config = {
        "pyarrow": DataConfig(source=f"parquet:{tmp_path}/a.parquet", cache=str(tmp_path)),
        "tokenizers": DataConfig(tokenizer=str(tmp_path / "tokenizer.json")),
        "tiktoken": DataConfig(tokenizer=str(tmp_path)),
    }[module]
    with pytest.raises(ValueError, match=rf"needs {module}: install the extra, .*\[data\]"):
        load(config, batch_size=1, sequence_length=8, seed=0)


def test_the_embedded_text_needs_no_extra():
    """But Flax, which brings rich."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules.update(dict.fromkeys("
        "['pyarrow','tiktoken','tokenizers','tensorflow_datasets','tyro']));"
        "from train.data import DataConfig, load;"
        "load(DataConfig(), batch_size=2, sequence_length=8, seed=0).batch(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_mixture_of_one_is_no_mixture():
    assert parse_mixture("text:a,b.txt") == [("text:a,b.txt", 1.0)]
    assert parse_mixture("tfds:glue/mrpc:train") == [("tfds:glue/mrpc:train", 1.0)]
