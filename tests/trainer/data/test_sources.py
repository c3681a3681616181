"""Every kind of source gives the same tokens for the same documents."""

import json

import numpy as np
import pytest
from corpora import DOCUMENTS, loader, write_tokens


def test_sources_agree_on_the_same_documents(files, tmp_path):
    small = loader(tmp_path)
    want = small(files).fingerprint
    (tmp_path / "all.txt").write_text("<|end|>".join(DOCUMENTS))
    assert small(f"text:{tmp_path / 'all.txt'}", separator="<|end|>").fingerprint == want
    rows = "".join(f'"{text}"\n' for text in DOCUMENTS)
    (tmp_path / "all.csv").write_text("\ufeffbody\n" + rows)  # as spreadsheets write it
    assert small(f"csv:{tmp_path / 'all.csv'}", text_field="body").fingerprint == want
    (tmp_path / "all.tsv").write_text("text\n" + "\n".join(DOCUMENTS))
    assert small(f"tsv:{tmp_path / 'all.tsv'}").fingerprint == want
    import bz2
    import lzma

    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()
    for suffix, pack in ((".xz", lzma.compress), (".bz2", bz2.compress)):
        (tmp_path / f"all.jsonl{suffix}").write_bytes(pack(lines))
        assert small(f"jsonl:{tmp_path}/all.jsonl{suffix}").fingerprint == want


def test_parquet_row_groups_are_read_one_by_one_and_only_the_column(files, tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow", reason="the extra data is not installed")
    import pyarrow.parquet as pq

    table = arrow.table({"text": DOCUMENTS, "other": range(200)})
    for i in range(2):
        pq.write_table(table[100 * i : 100 * i + 100], tmp_path / f"{i}.parquet", row_group_size=30)
    asked, read = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *args: asked.append(args[1:]) or read(*args)
    )
    small = loader(tmp_path)
    assert small(f"parquet:{tmp_path}/*.parquet").fingerprint == small(files).fingerprint
    assert sorted(groups for _, groups, _ in asked) == sorted([[0], [1], [2], [3]] * 2)
    assert all(columns == ["text"] for _, _, columns in asked)


def test_a_held_out_source_is_evaluated_on_whole_and_the_other_trained_on_whole(files, tmp_path):
    found = loader(tmp_path)(files, heldout_source="embedded", sequence_length=64)
    assert found.rows.heldout_count > 10_000
    other = loader(tmp_path)("embedded", heldout_source=files, sequence_length=64)
    assert other.rows.heldout_count == (sum(len(d) + 1 for d in DOCUMENTS) - 1) // 64
    assert other.bytes_per_token == pytest.approx(
        sum(map(len, DOCUMENTS)) / sum(len(d) + 1 for d in DOCUMENTS)
    )


def test_headerless_files_are_cut_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(32, 127, 1000)
    small = loader(tmp_path)
    one = small(f"bin:{write_tokens(tmp_path / 'one.bin', tokens)}", headerless="uint16")
    assert one.rows.heldout_count == 49 // 16 and one.bytes_per_token == 1
    (tmp_path / "two").mkdir()
    write_tokens(tmp_path / "two/train.bin", tokens[:950], np.uint32)
    write_tokens(tmp_path / "two/val.bin", tokens[950:], np.uint32)
    two = small(f"bin:{tmp_path / 'two'}", headerless="uint32")
    np.testing.assert_array_equal(one.batch(3).inputs, two.batch(3).inputs)
    np.testing.assert_array_equal(next(one.heldout()).targets, next(two.heldout()).targets)
