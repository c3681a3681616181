"""Rows of a classifier: what may be wrong with labels, and the order of classes."""

import pytest
from corpora import DOCUMENTS, loader, write_jsonl

from train.data.tasks import classify
from train.data.tasks.classify import class_names


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x", "label": 0.5}, "label 0.5 is not a class"),
        ({"text": "x", "label": None}, "label None is not a class"),
        ({"text": "x", "label": ""}, "label '' is not a class"),
        ({"text": "x"}, "no field 'label'; there are text"),
    ],
)
def test_labels_are_checked(tmp_path, record, message):
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    with pytest.raises(ValueError, match=message):
        loader(tmp_path)(f"jsonl:{path}", task="classify")


def test_classify_says_what_it_lacks(tmp_path):
    small = loader(tmp_path)
    one = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "no"}])
    with pytest.raises(ValueError, match="1 training and 0 held-out examples; give more"):
        small(f"jsonl:{one}", task="classify")
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "label": "maybe"}])
    with pytest.raises(
        ValueError, match="class 'maybe', which no training example has; those have no"
    ):
        small(f"jsonl:{one}", task="classify", heldout_source=f"jsonl:{other}")
    with pytest.raises(ValueError, match="names 3 fields; name one or two"):
        small(f"jsonl:{one}", task="classify", text_field="a,b,c")
    with pytest.raises(ValueError, match="reads one source, not a mixture"):
        small(f"jsonl:{one}:1,jsonl:{other}:1", task="classify")
    same = f"jsonl:{one}"
    with pytest.raises(ValueError, match="sequence_length=4 has no room"):
        small(same, task="classify", heldout_source=same, sequence_length=4)


def test_classes_that_are_one_number_have_one_order():
    # A set's order is that of hashes, which change with each process.
    names = class_names(["1", " 1", "01", "0", "+1", "10", "1_0"])
    assert names == ("0", " 1", "+1", "01", "1", "10", "1_0")
    assert class_names(["b", "1", "a", " 1"]) == (" 1", "1", "a", "b")


def test_names_of_classes_are_in_the_fingerprint(tmp_path, monkeypatch):
    small = loader(tmp_path)
    records = [{"text": text, "label": str(i % 2)} for i, text in enumerate(DOCUMENTS)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    before = small(f"jsonl:{path}", task="classify").fingerprint
    monkeypatch.setattr(classify, "class_names", lambda labels: ("1", "0"))
    assert small(f"jsonl:{path}", task="classify").fingerprint != before


def test_numbers_of_classes_go_by_their_size():
    assert class_names(["10", "2", "1"]) == ("1", "2", "10")
