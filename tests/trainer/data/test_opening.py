"""Files are opened by their first bytes, and unpack no more than their limits."""

import bz2
import codecs
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import DOCUMENTS, loader
from places import ROOT

from train.data.prepare import parquet as bounds
from train.data.prepare.opening import open_bytes
from train.data.prepare.records import Broken

arrow = pytest.importorskip("pyarrow", reason="the extra data is not installed")
import pyarrow.parquet as pq  # noqa: E402

TEXT = "héllo wörld, so it goes ☃\n" * 3000
LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


def packed_by(codec, raw):
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


PACKERS = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda raw: packed_by("zstd", raw),
    "lz4": lambda raw: packed_by("lz4", raw),
    "two gzip members": lambda raw: gzip.compress(raw[:99]) + gzip.compress(raw[99:]),
}
ENCODINGS = {
    "UTF-8": str.encode,
    "UTF-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "UTF-16LE": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "UTF-16BE": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "UTF-32LE": lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
    "UTF-32BE": lambda text: codecs.BOM_UTF32_BE + text.encode("utf-32-be"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["a", "a.TXT.GZ", "a.zst"])
def test_a_text_is_the_same_however_it_is_packed_encoded_and_called(
    tmp_path, name, packer, encoding
):
    (tmp_path / name).write_bytes(PACKERS[packer](ENCODINGS[encoding](TEXT)))
    with open_bytes(tmp_path / name) as file:
        assert file.read().decode() == TEXT


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "text"])
@pytest.mark.parametrize("encoding", ["UTF-8 with a mark", "UTF-16LE", "UTF-16BE"])
def test_readers_take_a_table_that_was_saved_as_unicode_text(tmp_path, kind, encoding):
    raw = {
        "jsonl": LINES.decode(),
        "csv": "text\r\n" + "\r\n".join(DOCUMENTS),
        "tsv": "text\n" + "\n".join(DOCUMENTS),
        "text": "|".join(DOCUMENTS),
    }[kind]
    (tmp_path / "a").write_bytes(gzip.compress(ENCODINGS[encoding](raw)))
    (tmp_path / "b").write_text("|".join(DOCUMENTS))
    found = loader(tmp_path)(f"{kind}:{tmp_path}/a", separator="|" if kind == "text" else "")
    want = loader(tmp_path)(f"text:{tmp_path}/b", separator="|")
    assert found.fingerprint == want.fingerprint


def tar(raw):
    import io
    import tarfile

    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as file:
        info = tarfile.TarInfo("a.txt")
        info.size = len(raw)
        file.addfile(info, io.BytesIO(raw))
    return sink.getvalue()


def zipped(raw):
    import io
    import zipfile

    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        file.writestr("a.txt", raw)
    return sink.getvalue()


def parquet(raw):
    sink = arrow.BufferOutputStream()
    pq.write_table(arrow.table({"text": [raw.decode()]}), sink)
    return sink.getvalue().to_pybytes()


NAMED = {
    "a zip archive": zipped,
    r"a tar archive": tar,
    r"a Parquet file: read it as parquet:": parquet,
    "packed twice, the second time by gzip": lambda raw: gzip.compress(gzip.compress(raw)),
    "iconv -f UTF-16LE": lambda raw: raw.decode().encode("utf-16-le"),
    "iconv -f UTF-16BE": lambda raw: raw.decode().encode("utf-16-be"),
    "iconv -f UTF-32LE": lambda raw: raw.decode().encode("utf-32-le"),
    "iconv -f UTF-32BE": lambda raw: raw.decode().encode("utf-32-be"),
    "begins as UTF-16LE but continues as something else": (
        lambda raw: codecs.BOM_UTF16_LE + raw.decode().encode("utf-16-le")[:-1]
    ),
    "7z": lambda raw: b"7z\xbc\xaf\x27\x1c" + raw,
    "a.dat: ": lambda raw: gzip.compress(raw)[:-20],
    "a.dat: Truncated": lambda raw: packed_by("zstd", raw)[:-9],
    "is empty once it is unpacked": lambda raw: gzip.compress(b""),
}


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("message", NAMED)
def test_what_cannot_be_read_is_named_and_is_never_called_latin1(tmp_path, kind, message):
    (tmp_path / "a.dat").write_bytes(NAMED[message](LINES))
    with pytest.raises(Broken, match=message) as error:
        loader(tmp_path)(f"{kind}:{tmp_path}/a.dat")
    assert "a.dat" in str(error.value) and "LATIN1" not in str(error.value)


def test_utf16_without_a_mark_is_seen_in_other_scripts_too(tmp_path):
    (tmp_path / "a").write_bytes(("Привет, мир, как дела\n" * 9).encode("utf-16-le"))
    with pytest.raises(Broken, match="iconv -f UTF-16LE -t UTF-8"):
        open_bytes(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"a few NULs\0 in a text of bytes\0 are a text of bytes" * 9)
    with open_bytes(tmp_path / "a") as file:
        assert file.read(3) == b"a f"


def test_parquet_that_is_something_else_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(gzip.compress(LINES))
    with pytest.raises(Broken, match=r"a\.parquet: not a whole Parquet file, which begins with"):
        loader(tmp_path)(f"parquet:{tmp_path}/a.parquet")


def repeated(path, values, rows, **how):
    """A column whose pages state each value once, by number in the rows."""
    numbers = arrow.array([i % len(values) for i in range(rows)], arrow.int32())
    column = arrow.DictionaryArray.from_arrays(numbers, arrow.array(values))
    how = {"compression": "zstd", "row_group_size": rows} | how
    pq.write_table(arrow.table({"text": column}), path, **how)
    return path


MEASURED = """
import sys
from pathlib import Path
import pyarrow.compute, pyarrow.parquet
from train.data.config import DataConfig
from train.data.prepare.documents import documents
from train.data.prepare.records import SourceFile

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) // 1024

for path in sys.argv[1:]:
    shard, before = SourceFile("parquet", Path(path)), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    try:
        found = documents(shard, DataConfig(document_limit=2**25), ("text",), [])
        said = f"read {sum(len(text) for (text,) in found)}"
    except ValueError as error:
        said = f"refused {error}"
    print(memory("VmHWM") - before, said)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_a_few_kilobytes_that_state_gigabytes_are_refused_in_little_memory(tmp_path):
    paths = [
        repeated(tmp_path / f"{size}.parquet", ["x" * size], rows)
        for size, rows in ((10**7, 1000), (10**4, 10**6), (6 * 10**7, 200))
    ]
    plain = {"compression": "zstd", "use_dictionary": False}
    paths.append(tmp_path / "plain.parquet")
    pq.write_table(arrow.table({"text": ["x" * 2 * 10**6] * 50}), paths[-1], **plain)
    assert all(path.stat().st_size < 9000 for path in paths)
    letters = np.random.default_rng(0).integers(97, 123, 4 * 10**7, np.uint8)  # which do not pack
    paths.append(repeated(tmp_path / "large.parquet", [letters.tobytes().decode()], 5))
    told = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.splitlines()
    for path, line in zip(paths, told, strict=True):
        peak, _, said = line.partition(" ")
        assert said.startswith("refused") and f"{path}, row group 0: " in said
        assert int(peak) <= 2 * 32 + 64


def test_a_dictionary_that_repeats_some_text_is_read(tmp_path):
    path = repeated(tmp_path / "a.parquet", [text * 9 for text in DOCUMENTS], 5000)
    found = loader(tmp_path)(f"parquet:{path}")
    (tmp_path / "a.txt").write_text("|".join((DOCUMENTS[i % 200] * 9) for i in range(5000)))
    want = loader(tmp_path)(f"text:{tmp_path}/a.txt", separator="|")
    assert found.fingerprint == want.fingerprint


def test_a_row_over_the_limit_is_passed_over_and_the_others_are_read(tmp_path):
    texts = [*DOCUMENTS[:9], "x" * 5000, *DOCUMENTS[9:]]
    pq.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet")
    from train.data import DataConfig
    from train.data.prepare.prepare import prepare

    config = DataConfig(broken="skip", document_limit=999)
    header = prepare(f"parquet:{tmp_path}/a.parquet", tmp_path / "out", config, quiet=True)
    assert header["skipped"]["count"] == 1
    assert "row 9: 5000 bytes, more than --data.document-limit" in header["skipped"]["first"][0]
    assert sum(split["documents"] for split in header["splits"].values()) == 200


def test_a_nested_column_is_refused_before_it_is_unpacked(tmp_path):
    column = arrow.array([[None] * 10**6] * 3, arrow.list_(arrow.int8()))
    pq.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(Broken, match=r"column 'text' holds list<.*>, not text"):
        loader(tmp_path)(f"parquet:{tmp_path}/a.parquet")


def test_a_parquet_cell_that_is_not_utf8_is_named_by_its_row(tmp_path):
    raw = arrow.array([b"so", b"caf\xe9", b"goes"], arrow.binary())
    column = arrow.Array.from_buffers(arrow.string(), 3, raw.buffers())
    pq.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(Broken, match=r"row group 0, row 1: byte 3 is not UTF-8"):
        loader(tmp_path)(f"parquet:{tmp_path}/a.parquet")


def test_row_groups_have_a_limit(tmp_path, monkeypatch):
    pq.write_table(
        arrow.table({"text": DOCUMENTS, "big": ["y" * 999] * 200}), tmp_path / "a.parquet"
    )
    size = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(0)
    monkeypatch.setattr(bounds, "ROW_GROUP_LIMIT", size.total_uncompressed_size)
    loader(tmp_path)(f"parquet:{tmp_path / 'a.parquet'}")  # the big column is not read
    monkeypatch.setattr(bounds, "ROW_GROUP_LIMIT", size.total_uncompressed_size - 1)
    with pytest.raises(Broken, match=r"row group 0: at least \d+ bytes.*smaller row groups"):
        loader(tmp_path)(f"parquet:{tmp_path / 'a.parquet'}", heldout_fraction=0.1)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_parquet_file_is_named(tmp_path, keep):
    path = tmp_path / "a.parquet"
    pq.write_table(arrow.table({"text": DOCUMENTS}), path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(Broken, match=r"a\.parquet: not a whole Parquet file .*Repair"):
        loader(tmp_path)(f"parquet:{path}")


def test_a_parquet_file_without_the_column_lists_its_columns(tmp_path):
    pq.write_table(arrow.table({"content": DOCUMENTS, "url": DOCUMENTS}), tmp_path / "a.parquet")
    with pytest.raises(Broken, match="no column 'text'; there are content, url"):
        loader(tmp_path)(f"parquet:{tmp_path / 'a.parquet'}")


def test_a_cut_gzip_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES)[:-20])
    with pytest.raises(Broken, match=r"a\.jsonl\.gz: .*Repair or remove it"):
        loader(tmp_path)(f"jsonl:{path}")
