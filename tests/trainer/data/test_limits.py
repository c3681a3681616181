"""Documents, lines and cells at the limit, and separators beyond it."""

import pytest

from train.data import DataConfig
from train.data.prepare.documents import documents
from train.data.prepare.records import Broken, SourceFile

LIMIT = 40
AT_THE_LIMIT = {  # a file with a document, a line or a cell of exactly 40 bytes
    "text": b"x" * LIMIT,
    "jsonl": b'{"text": "' + b"x" * (LIMIT - 13) + b'"}\n',
    "csv": b"text\n" + b"x" * (LIMIT - 1) + b"\n",
}


@pytest.mark.parametrize("kind", AT_THE_LIMIT)
def test_what_is_as_long_as_the_limit_is_read(tmp_path, kind):
    path, shard = tmp_path / "a", SourceFile(kind, tmp_path / "a")
    path.write_bytes(AT_THE_LIMIT[kind])
    assert len([*documents(shard, DataConfig(document_limit=LIMIT), ("text",), [])]) == 1
    with pytest.raises(Broken, match=r"more than --data\.document-limit 39"):
        [*documents(shard, DataConfig(document_limit=LIMIT - 1), ("text",), [])]


def test_a_cell_of_parquet_as_long_as_the_limit_is_read(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="extra data")
    import pyarrow.parquet as pq

    path, skipped = tmp_path / "a.parquet", []
    texts = ["x" * 400, "x" * 401, *["so"] * 2000]  # many short ones, so that rows are read at once
    pq.write_table(arrow.table({"text": texts}), path, use_dictionary=False)
    config = DataConfig(document_limit=400, broken="skip")
    found = documents(SourceFile("parquet", path), config, ("text",), skipped)
    assert [len(text) for (text,) in found] == [400, *[2] * 2000]
    assert len(skipped) == 1 and "row 1: 401 bytes" in skipped[0]


@pytest.mark.parametrize("beyond", range(1, 7))
def test_a_separator_may_lie_across_two_reads_of_a_document_that_is_too_long(tmp_path, beyond):
    """A file is read in pieces of 1 MiB, and a document over the limit is not kept."""
    path, skipped = tmp_path / "a", []
    path.write_bytes(b"x" * (2**20 - beyond) + b"<|end|>three")
    config = DataConfig(document_limit=LIMIT, broken="skip", separator="<|end|>")
    found = [*documents(SourceFile("text", path), config, ("text",), skipped)]
    assert found == [("three",)] and len(skipped) == 1
