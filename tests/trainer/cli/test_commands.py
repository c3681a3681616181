"""Commands on runs: each on one that trained for a few steps."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from models import PRESETS, DecoderConfig, huggingface
from train import loop, program
from train.checkpoint import moved, warm_start
from train.cli import main, resume
from train.config import serialize
from train.config.presets import preset
from train.config.schema import OutputConfig
from train.config.serialize import load
from train.data import DataConfig
from train.logging.jsonl import read_history
from train.parallel.mesh import MeshConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of eight steps on rows over eight devices."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shown = OutputConfig(folder=str(folder), compile_cache="", quiet=True, checkpoint_every=8)
    loop.train(
        dataclasses.replace(
            preset("tiny", "adamw"),
            model=DecoderConfig(vocab_size=256, context=16, width=16, layers=2, heads=2),
            data=DataConfig(heldout_fraction=0.003),
            mesh=MeshConfig(fsdp=8),
            output=shown,
            steps=8,
            warmup_steps=2,
            batch_size=8,
            sequence_length=16,
        )
    )
    return folder


def test_eval_prints_what_the_run_measured(run, capsys):
    main.main(["eval", str(run)])
    shown = capsys.readouterr().out
    last = [row for row in read_history(run) if "heldout_loss" in row][-1]
    assert f"heldout loss: {last['heldout_loss']:.4f}" in shown
    assert f"bits per byte: {last['bits_per_byte']:.4f}" in shown
    assert f"{run} at step 8" in shown


def test_a_run_is_loaded_in_shards_and_without_its_optimizer(run, monkeypatch):
    """Also where its rows do not divide over the devices that are here."""
    monkeypatch.setattr(program, "assemble", None)
    uneven = dataclasses.replace(load(run), batch_size=9, accumulation=3)
    monkeypatch.setattr(serialize, "load", lambda folder: uneven)
    loaded = warm_start.load(run)
    matrix = loaded.params["tokens"]["embedding"]
    assert matrix.shape == (256, 16)
    assert {x.data.shape for x in matrix.addressable_shards} == {(256, 2)}
    last = [row for row in read_history(run) if "heldout_loss" in row][-1]
    reached = loaded.evaluate(loaded.params)
    assert reached["heldout_loss"] == pytest.approx(last["heldout_loss"], rel=1e-5)


def test_sample_goes_on_from_the_prompt_repeats_itself_and_reads_no_data(run, capsys, monkeypatch):
    monkeypatch.delattr(program.data, "load")
    words = ["sample", str(run), "To be", "--length", "12", "--top-k", "5", "--seed", "3"]
    shown = []
    for _ in range(2):
        main.main(words)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert shown[0].startswith("To be")
    assert len(shown[0].rstrip("\n")) > len("To be")


def test_export_and_import_give_back_the_model_bit_by_bit(run, tmp_path, capsys):
    """The run's parameters, through a Hugging Face folder, in a run that can be resumed."""
    main.main(["export", str(run), str(tmp_path / "hf")])
    main.main(["import", str(tmp_path / "hf"), str(tmp_path / "again"), "--optimizer", "lion"])
    assert re.search(r"again holds the model; go on with: .* sample", capsys.readouterr().out)
    before, after = warm_start.load(run), warm_start.load(tmp_path / "again")
    assert after.step == 0 and after.config.name == "gpt2-30m-lion"
    assert after.config.model.scan_layers and after.config.model.bias
    main.main(["export", str(tmp_path / "again"), str(tmp_path / "hf2")])
    want, have = (huggingface.load(tmp_path / name)[1] for name in ("hf", "hf2"))
    jax.tree.map(np.testing.assert_array_equal, have, want)
    np.testing.assert_array_equal(want["tokens"]["embedding"], before.params["tokens"]["embedding"])


def test_a_run_may_start_from_another_in_the_other_layout(run, tmp_path):
    start = dataclasses.replace(
        load(run),
        start_from=str(run),
        mesh=MeshConfig(tensor=2),
        steps=9,
        model=dataclasses.replace(load(run).model, scan_layers=True),
        output=dataclasses.replace(load(run).output, folder=str(tmp_path / "next")),
    )
    loop.begin(start)
    before, after = warm_start.load(run).params, warm_start.load(tmp_path / "next").params
    for layer in range(2):
        jax.tree.map(
            lambda x, y, layer=layer: np.testing.assert_array_equal(x[layer], y),
            after["blocks"],
            before["blocks"][f"{layer:02d}"],
        )


@pytest.mark.parametrize("exported", [False, True])
def test_a_vocabulary_is_padded_as_the_new_run_wants(run, exported, tmp_path, capsys):
    main.main(["export", str(run), str(tmp_path / "hf")])
    start = dataclasses.replace(
        load(run),
        start_from=str(tmp_path / "hf" if exported else run),
        mesh=MeshConfig(tensor=2),
        model=dataclasses.replace(load(run).model, vocab_multiple=96, bias=exported),
    )
    fresh = program.assemble(start).abstract.params
    begun = warm_start.start_from(Path(start.start_from), start, fresh)["tokens"]["embedding"]
    before = warm_start.load(run).params["tokens"]["embedding"]
    np.testing.assert_array_equal(begun[:256], before)
    assert begun.shape == (288, 16) and not np.any(begun[256:])
    assert begun.sharding == fresh["tokens"]["embedding"].sharding


def test_a_run_without_a_checkpoint_is_no_start_and_says_what_to_do(run, tmp_path):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(ValueError, match=rf"no checkpoint yet: .* -m train resume {tmp_path}, or"):
        warm_start.start_from(tmp_path, load(run), None)


def test_another_model_is_refused_by_the_name_of_a_leaf(run, tmp_path):
    wider = dataclasses.replace(load(run).model, width=32)
    start = dataclasses.replace(
        load(run),
        start_from=str(run),
        model=wider,
        output=dataclasses.replace(load(run).output, folder=str(tmp_path / "next")),
    )
    with pytest.raises(ValueError, match=r"'query'\] is \(16, 16\), not \(32, 32\)"):
        loop.begin(start)


@pytest.mark.parametrize("words", [["eval"], ["sample"], ["export"]])
def test_a_folder_without_a_run_is_named(words, tmp_path):
    extra = {"sample": ["x"], "export": [str(tmp_path / "out")]}.get(words[0], [])
    with pytest.raises(SystemExit, match=r"holds no config\.json"):
        main.main([*words, str(tmp_path), *extra])


def test_every_command_has_help(capsys):
    for name in main.COMMANDS:
        with contextlib.suppress(SystemExit):
            main.main([name, "--help"])
        assert "usage" in capsys.readouterr().out.lower(), name


def test_the_table_of_models_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in PRESETS)
    assert all(name in shown for name in main.COMMANDS)


def test_a_checkpoint_that_was_passed_over_is_told_beside_the_result(run, monkeypatch, capsys):
    load = warm_start.load
    monkeypatch.setattr(
        warm_start, "load", lambda *args: load(*args)._replace(notes=("8 is damaged",))
    )
    main.main(["eval", str(run)])
    out, err = capsys.readouterr()
    assert "heldout loss" in out and "damaged" not in out
    assert err == "8 is damaged\n"
    with pytest.raises(SystemExit, match="--length -1 is negative"):
        main.main(["sample", str(run), "A", "--length", "-1"])


def corpus_run(tmp_path, monkeypatch):
    """Two steps on a text that is named by a path from the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be " * 500)
    words = "tiny adamw --model.width 16 --model.layers 1 --model.heads 2 --steps 2 --output.quiet"
    words += " --batch-size 8 --sequence-length 16 --data.source text:text.txt --data.cache cache"
    main.main([*words.split(), "--output.folder", "run", "--output.compile-cache", ""])
    return tmp_path / "run"


def test_a_run_is_used_from_another_folder_and_its_data_may_move(tmp_path, monkeypatch, capsys):
    """What the fingerprint says is the same data is; anything else is refused or told."""
    folder, elsewhere = corpus_run(tmp_path, monkeypatch), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    main.main(["eval", str(folder)])
    there = (tmp_path / "text.txt").rename(elsewhere / "moved.txt")
    before = str(tmp_path / "text.txt")
    for words in (["eval", str(folder)], ["resume", str(folder)]):
        with pytest.raises(SystemExit, match=rf"Nothing is at {before}: .* --data.source text:NEW"):
            main.main(words)
    capsys.readouterr()
    main.main(["eval", str(folder), "--data.source", "text:moved.txt"])
    assert "not what the run was trained on" not in capsys.readouterr().err
    again = ["--compile-cache", "", "--data.source", "text:moved.txt"]
    main.main(["resume", str(folder), "--steps", "3", *again])
    assert load(folder).data.source == f"text:{there}"
    there.write_text("nor to be " * 900)
    main.main(["eval", str(folder)])
    assert "the data is not what the run was trained on" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"data .* -> .* go on with --allow-changes"):
        main.main(["resume", str(folder), "--steps", "4", *again])
    assert not list(elsewhere.glob("cache"))  # which is where it was, too


def test_an_imported_model_is_resumed_for_as_many_steps_as_one_likes(run, tmp_path):
    """Its preset warms up over 2000 steps of 100,000."""
    main.main(["export", str(run), str(tmp_path / "hf")])
    main.main(["import", str(tmp_path / "hf"), str(tmp_path / "again")])
    made = dataclasses.replace(load(tmp_path / "again"), batch_size=8)
    assert dataclasses.replace(made, steps=60).warmup == 6
    made = dataclasses.replace(made, warmup_steps=2000)
    serialize.save(made, tmp_path / "again")
    with pytest.raises(SystemExit, match="give --warmup-steps too"):
        main.main(["resume", str(tmp_path / "again"), "--steps", "60"])
    words = ["resume", str(tmp_path / "again"), "--steps", "60", "--warmup-steps", "5"]
    assert resume.parse(words[1:]).warmup_steps == 5


@pytest.mark.parametrize(
    ("name", "words"), [("", "has no config.json"), ("none", "does not exist")]
)
def test_what_is_no_folder_to_start_from_is_named(name, words, tmp_path, run):
    with pytest.raises(ValueError, match=f"--start-from .* {words}: give the folder of a run, or"):
        warm_start.start_from(tmp_path / name, load(run), None)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"model": '])
def test_a_folder_to_start_from_whose_config_makes_no_sense_is_named(text, tmp_path, run):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json (is not JSON|holds)"):
        warm_start.start_from(tmp_path, load(run), None)


def test_a_folder_of_tokens_that_moved_brings_its_tokenizer(tmp_path, monkeypatch, capsys):
    """For every command that reads it; what is given is kept in paths from the root on."""
    for old in ("text.txt", "old"):
        assert not (tmp_path / old).exists()
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not " * 900)
    main.main(["train-tokenizer", "text:text.txt", "-o", "tok.json", "--vocab-size", "270"])
    main.main(["prepare", "text:text.txt", "-o", "old/bin", "--data.tokenizer", "tok.json"])
    words = "tiny adamw --model.width 16 --model.layers 1 --model.heads 2 --steps 2 --output.quiet"
    words += " --batch-size 8 --sequence-length 16 --data.source bin:old/bin"
    main.main([*words.split(), "--model.vocab-size", "270", "--output.folder", "run"])
    Path("old").rename("new")
    lost = re.escape(f"Nothing is at {tmp_path / 'old/bin'}")
    for command in ("eval run", "sample run to", "export run out", "resume run"):
        with pytest.raises(SystemExit, match=rf"{lost}: .* --data.source bin:NEW\."):
            main.main(command.split())
    there = ["--data.source", "bin:new/bin"]
    main.main(["eval", "run", *there])
    main.main(["sample", "run", "to", "--length", "2", *there])
    main.main(["export", "run", "out", *there])
    assert (
        len(json.loads(Path("out/tokenizer.json").read_text())["model"]["vocab"]) == 266
    )  # there are no more
    main.main(["resume", "run", "--steps", "3", *there, "--data.tokenizer", "tok.json"])
    assert load(Path("run")).data.tokenizer == str(tmp_path / "tok.json")
    Path("tok.json").unlink()
    with pytest.raises(SystemExit, match=r"Nothing is at .*tok.json: .* --data.tokenizer NEW\."):
        main.main(["eval", "run"])


def test_ids_alone_have_no_tokenizer_that_can_be_lost(tmp_path):
    np.arange(3, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    source = DataConfig(source=f"bin:{tmp_path / 'ids.bin'}", tokenizer="ids:3")
    run = dataclasses.replace(preset(), data=source)
    with pytest.raises(ValueError, match=r"^too short$"), moved.explained(run):
        raise ValueError("too short")
