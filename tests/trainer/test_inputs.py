"""The data of a run against its model: the vocabulary and the classes."""

import dataclasses

import numpy as np
import pytest
from corpora import write_tokens
from small_run import small

from models import EncoderConfig
from train import inputs
from train.data import DataConfig


def with_vocabulary(size, **data):
    run = small("unused", "adamw")
    model = dataclasses.replace(run.model, vocab_size=size)
    return dataclasses.replace(run, model=model, data=DataConfig(**data))


def test_a_model_has_room_for_every_token():
    assert inputs.load_tokenizer(with_vocabulary(256)).vocab_size == 256
    with pytest.raises(ValueError, match=r"256 tokens, more than the 255 .*--model.vocab-size 256"):
        inputs.load_tokenizer(with_vocabulary(255))


@pytest.mark.parametrize(("largest", "size"), [(400, 401), (99, 256)])
def test_a_vocabulary_grows_to_the_tokens_and_never_shrinks(tmp_path, largest, size):
    write_tokens(tmp_path / "train.bin", np.arange(999) % (largest + 1))
    write_tokens(tmp_path / "val.bin", np.arange(99))
    settled = inputs.settled(with_vocabulary(256, source=f"bin:{tmp_path}"))
    assert settled.model.vocab_size == size
    assert settled.data.tokenizer == f"ids:{largest + 1}"
    named = with_vocabulary(256, source=f"bin:{tmp_path}", tokenizer="ids:700")
    assert inputs.settled(named).model.vocab_size == 256


@pytest.mark.parametrize(("classes", "said"), [(3, ""), (2, "the model 2"), (4, "the model 4")])
def test_a_model_has_the_classes_of_its_data(tmp_path, classes, said):
    labelled = tmp_path / "a.jsonl"
    labelled.write_text("".join(f'{{"text": "so {i}", "label": {i % 3}}}\n' for i in range(60)))
    data = DataConfig(source=f"jsonl:{labelled}", task="classify", heldout_fraction=0.2)
    model = EncoderConfig(classes=classes, width=16, layers=1, heads=2, context=16, vocab_size=256)
    load = inputs.loader(dataclasses.replace(small("unused", "adamw"), model=model, data=data), 8)
    if not said:
        assert load().classes == 3
        return
    with pytest.raises(ValueError, match=rf"has 3 classes \(0, 1, 2\), {said}"):
        load()
