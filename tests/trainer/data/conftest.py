"""Fixtures of the tests of data."""

import pytest
from corpora import DOCUMENTS, write_jsonl


@pytest.fixture
def files(tmp_path):
    """Four files of fifty documents."""
    for i in range(4):
        records = [{"text": text} for text in DOCUMENTS[50 * i : 50 * i + 50]]
        write_jsonl(tmp_path / f"{i}.jsonl", records)
    return f"jsonl:{tmp_path}/?.jsonl"
