import dataclasses
import re
import subprocess
import sys

import pytest

from train.cli import flags, main
from train.cli.train import parse
from train.config import command_line, schema
from train.config.presets import preset
from train.optimizers.registry import OPTIMIZERS


def test_positional_names_choose_the_defaults_and_flags_change_them():
    run = parse(["tiny", "sophia-g", "--optim.gamma", ".07", "--mesh.fsdp", "4", "--steps", "500"])
    want = preset("tiny", "sophia-g")
    assert run == dataclasses.replace(
        want,
        optim=dataclasses.replace(want.optim, gamma=0.07),
        mesh=dataclasses.replace(want.mesh, fsdp=4),
        steps=500,
    )


def test_no_names_mean_the_tiny_model_with_sophia_g():
    assert parse([]) == preset("tiny", "sophia-g")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("--run.quiet", "--output.quiet", "--run.quiet is now --output.quiet"),
        ("--run.folder=--run.x", "--output.folder=--run.x", "--run.folder is now --output.folder"),
        ("--optim.no-spread", "--optim.no-amortize", "is now --optim.no-amortize"),
        ("--optim.b2_numbers=.9", "--optim.b2_vector=.9", "is now --optim.b2_vector"),
        ("a--run.x", "a--run.x", ""),
        ("--steps", "--steps", ""),
    ],
)
def test_flags_of_older_versions_are_read_and_their_new_names_printed(old, new, said, capsys):
    assert flags.current([old, "9"]) == [new, "9"]
    printed = capsys.readouterr().err
    assert said in printed and bool(said) == bool(printed)


@pytest.mark.parametrize("model", ["tiny", "gpt2-125m"])
def test_a_run_prints_the_command_that_makes_it_again(model):
    run = preset(model, "sophia-g")
    run = dataclasses.replace(
        run,
        optim=dataclasses.replace(run.optim, gamma=0.07, debias_momentum=False),
        steps=5000,
    )
    words = command_line.command(run).split()
    assert words[:3] == ["python", "-m", "train"]
    assert parse(words[3:]) == run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiny sofia", "Did you mean sophia"),
        ("adamw", "That is an optimizer: name the model before it, such as tiny adamw"),
        ("resum runs", "Did you mean resume"),
        ("resume nowhere", "nowhere does not exist"),
        ("tiny adamw --optim.lr 3", r"--optim\.lr. Did you mean --optim\.learning-rate\?"),
        ("tiny adamw --lr=3", r"--lr. Did you mean --optim\.learning-rate\?"),
        ("tiny adamw --wd .1", r"--wd. Did you mean --optim\.weight-decay\?"),
        ("tiny adamw --optim.beta1 .9", r"Did you mean --optim\.b1\?"),
        ("tiny adamw --bs 8", r"Did you mean --batch-size\?"),
        ("tiny adamw --seq_len 8", r"--seq_len. Did you mean --sequence-length\?"),
        ("tiny adamw --out-dir x", r"Did you mean --output\.folder\?"),
        ("tiny adamw --batchsize 8", r"Did you mean --batch-size\?"),
        ("tiny adamw --optim.learnin-rate 8", r"Did you mean --optim\.learning-rate\?"),
        ("tiny adamw --xyzzy 8", r"unknown flag --xyzzy. All are listed by .* tiny adamw --help"),
        ("resume gs://bucket/run", "gs:/bucket/run is an address, not a path"),
        ("eval gs://bucket/run", "gs://bucket/run is an address"),
        ("sample gs://bucket/run http://a", "gs://bucket/run is an address"),
        ("export runs s3://bucket/out", "s3://bucket/out is an address"),
        ("import s3://bucket/in runs", "s3://bucket/in is an address"),
        ("prepare text:a -o gs://bucket/out", "gs://bucket/out is an address"),
        ("prepare text:a --output=gs://bucket/out", "gs://bucket/out is an address"),
        ("tiny --start-from hdfs://a/b", "hdfs://a/b is an address"),
        ("tiny --output.folder /dev/null/run", "Choose a folder that can be written"),
        ("tiny --mesh.fsdp 3", "does not use 8 devices exactly"),
        ("tiny --batch-size 12", "does not divide over 8 devices"),
    ],
)
def test_a_mistake_ends_with_one_line_that_names_the_cure(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main.main(words.split())


@pytest.mark.parametrize("flag", ["--output.folder", "--data.cache", "--data.source"])
def test_an_object_store_is_refused_before_training(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main.main(["tiny", "adamw", flag, "gs://bucket/run"])
    assert "gs://bucket/run is an address" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="gs://bucket/run is an address"):
        schema.OutputConfig(folder="gs://bucket/run")


def test_every_flag_is_known_to_be_one():
    """Each with the value that it has, so that nothing is refused that tyro takes."""
    for model, optimizer in (("tiny", "sophia-g"), ("bert-small", "muon"), ("gpt2-125m", "soaa")):
        run = preset(model, optimizer)
        for flag in flags.names(run):
            flags.check([f"--{flag}"], {"": run}, "")
            flags.check([f"--{flag.replace('-', '_')}=3"], {"": run}, "")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_help_of_an_optimizer_explains_it_and_each_flag(optimizer, capsys):
    with pytest.raises(SystemExit):
        parse(["tiny", optimizer, "--help"])
    panel = capsys.readouterr().out.partition("optim options")[2].partition("mesh options")[0]
    _, about, flags = re.split("[─-]{40,}", panel)[:3]
    kind, words = OPTIMIZERS[optimizer], " ".join(about.replace("│", " ").split())
    assert " ".join(kind.__doc__.split("\n\n")[0].split()) in words
    assert "step = -lr" in words and re.search("state.*takes", words)
    explained = {
        flag.split()[0].rstrip(",").replace("-", "_")
        for flag in flags.replace("│", " ").split("--optim.")[1:]
        if re.search(r"(\S+\s+){3,}\(default:\s", flag)
    }
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields == {name.removeprefix("no_") for name in explained}


def test_the_general_help_has_a_line_for_each_optimizer():
    for name, kind in OPTIMIZERS.items():
        assert re.search(
            rf"^  {name} +{re.escape(kind.__doc__.splitlines()[0])}$", main.usage(), re.M
        )
    assert max(map(len, main.usage().splitlines())) <= 100


@pytest.mark.parametrize("optimizer", ["soaa", "orthosoph", "adafactor"])
def test_a_run_of_any_optimizer_prints_the_command_that_makes_it_again(optimizer):
    run = preset("gpt2-125m", optimizer)
    changes = {"soaa": {"rule": "tadam"}, "orthosoph": {"rms": None, "form": "tiles"}}
    optim = dataclasses.replace(run.optim, **changes.get(optimizer, {"momentum": 0.5}))
    run = dataclasses.replace(run, optim=optim)
    assert parse(command_line.command(run).split()[3:]) == run


@pytest.mark.parametrize(("words", "cure"), [(["tiny"], True), ([], True), (["eval", "x"], False)])
def test_a_folder_is_to_be_chosen_for_a_new_run_alone(words, cure, monkeypatch):
    def fails(args):
        raise PermissionError(13, "Permission denied", "metrics.jsonl")

    monkeypatch.setattr(main, "_run", fails)
    with pytest.raises(SystemExit, match="Permission denied") as ended:
        main.main(words)
    assert ("--output.folder" in str(ended.value)) == cure


def test_the_help_names_every_model_optimizer_and_flag():
    command = [sys.executable, "-m", "train", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("gpt2-770m", "muon", "resume", "--optim.gamma", "--mesh.fsdp", "--steps"):
        assert word in text


def test_a_reader_that_stops_early_is_no_mistake():
    command = f"{sys.executable} -m train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Train a language model") and done.stderr == ""
