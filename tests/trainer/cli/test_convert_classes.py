"""Import and export of classifiers: classes keep their names, whatever their order."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_models import SIZES, model_in, read, word_pieces

from models import EncoderConfig, huggingface, split
from train import data
from train.checkpoint import classes, warm_start
from train.checkpoint.start import begin
from train.cli import main
from train.config.presets import preset
from train.config.schema import OutputConfig

NAMES = ("good", "so-so", "bad")  # a run has them by the alphabet


@pytest.fixture
def classifier(tmp_path):
    """(folder of a classifier, labelled texts, the logits that it gives some tokens)."""
    model = EncoderConfig(vocab_size=100, classes=3, **SIZES)
    params = model_in(tmp_path / "source", model, class_names=NAMES)
    word_pieces().save(str(tmp_path / "source" / "tokenizer.json"))
    lines = [{"text": f"be {i} {n}", "label": n} for i in range(40) for n in NAMES]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "source", f"jsonl:{tmp_path}/a.jsonl", logits(model, params)


def logits(model, params):
    tokens = np.arange(16, dtype=np.int32)[None] + 5
    return np.asarray(split(model).apply(params, tokens))[0]


def test_classes_keep_their_names_and_numbers(classifier, tmp_path, capsys):
    source, texts, before = classifier
    run, out = tmp_path / "run", tmp_path / "out"
    main.main(["import", str(source), str(run), "--data.source", texts])
    loaded = warm_start.load(run)
    assert sorted(NAMES) == ["bad", "good", "so-so"]
    inside = logits(loaded.config.model, loaded.params)
    np.testing.assert_allclose(inside, before[[2, 0, 1]], rtol=1e-5)
    main.main(["export", str(run), str(out)])
    assert huggingface.read_notes(out).class_names == NAMES
    np.testing.assert_allclose(logits(*huggingface.load(out)), before, rtol=1e-5)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    capsys.readouterr()
    main.main(["export", str(run), str(tmp_path / "without")])
    assert "classes are written as LABEL_0, LABEL_1, ...:" in capsys.readouterr().err


@pytest.mark.slow
def test_a_new_run_has_the_classes_of_a_folder_by_name(classifier, tmp_path):
    source, _, before = classifier
    model, _ = huggingface.load(source)
    (tmp_path / "other.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("good", "ok"))
    for name, same in (("a", True), ("other", False)):
        start = dataclasses.replace(
            preset("tiny-bert", "adamw"),
            model=model,
            data=data.DataConfig(
                source=f"jsonl:{tmp_path}/{name}.jsonl",
                task="classify",
                tokenizer=str(source / "tokenizer.json"),
            ),
            sequence_length=16,
            start_from=str(source),
            output=OutputConfig(folder=str(tmp_path / name), compile_cache="", quiet=True),
        )
        begin(start)
        found = logits(model, warm_start.load(tmp_path / name).params)
        assert np.allclose(found, before[[2, 0, 1]], rtol=1e-5) == same, name
    shown = dataclasses.replace(start.output, folder=str(tmp_path / "again"))
    begin(dataclasses.replace(start, start_from=str(tmp_path / "a"), output=shown))
    found = logits(
        model, warm_start.load(tmp_path / "again").params
    )  # of a run with other names, too
    assert not np.allclose(found, before[[2, 0, 1]], rtol=1e-5)
    main.main(["export", str(tmp_path / "a"), str(tmp_path / "out")])
    assert huggingface.read_notes(tmp_path / "out").class_names == ("bad", "good", "so-so")


def test_a_classifier_needs_texts_with_its_classes(classifier, tmp_path):
    source, texts, _ = classifier
    with pytest.raises(SystemExit, match=r"a classifier of good, so-so, bad: name labelled texts"):
        main.main(["import", str(source), str(tmp_path / "run")])
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace("so-so", "fine"))
    with pytest.raises(SystemExit, match=r"of good, so-so, bad, but .* classes bad, fine, good"):
        main.main(["import", str(source), str(tmp_path / "run"), "--data.source", texts])
    assert not (tmp_path / "run").exists()


def test_classes_go_by_number_where_one_side_has_no_names():
    assert classes.order(("0", "1", "2"), NAMES) == [0, 1, 2]
    assert classes.order(NAMES, ("LABEL_0", "LABEL_1", "LABEL_2")) == [0, 1, 2]
    assert classes.order(("bad", "good", "so-so"), NAMES) == [2, 0, 1]
    assert classes.order(("bad", "good"), NAMES) is None
    assert classes.order(("bad", "good", "x"), NAMES) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "it needs a name for each class 0, 1, 2"),
        ({"id2label": ["a"]}, "it needs a name for each class"),
        ({"id2label": {"0": 5}}, "names of classes are strings"),
        ({"id2label": None, "num_labels": 2**40}, "num_labels=1099511627776: it needs"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' is not a token"),
        ({"eos_token_id": [True]}, "is not a token"),
    ],
)
def test_malformed_names_and_ids_are_refused(fields, message, classifier):
    path = classifier[0] / "config.json"
    path.write_text(json.dumps(read(path) | fields))
    refuses = huggingface.read_notes if "eos_token_id" in fields else huggingface.load
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        refuses(classifier[0])
