import dataclasses
import subprocess
import sys

import pytest

from train import cli, config
from train.config import preset


def test_positional_names_choose_the_defaults_and_flags_change_them():
    run = cli.parse(
        ["tiny", "sophia-g", "--optim.gamma", ".07", "--mesh.fsdp", "4", "--steps", "500"]
    )
    want = preset("tiny", "sophia-g")
    assert run == dataclasses.replace(
        want,
        optim=dataclasses.replace(want.optim, gamma=0.07),
        mesh=dataclasses.replace(want.mesh, fsdp=4),
        steps=500,
    )


def test_no_names_mean_the_tiny_model_with_sophia_g():
    assert cli.parse([]) == preset("tiny", "sophia-g")


@pytest.mark.parametrize("model", ["tiny", "gpt2-125m"])
def test_a_run_prints_the_command_that_makes_it_again(model):
    run = preset(model, "sophia-g")
    run = dataclasses.replace(
        run,
        optim=dataclasses.replace(run.optim, gamma=0.07, debias_momentum=False),
        steps=5000,
    )
    words = config.command(run).split()
    assert words[:3] == ["python", "-m", "train"]
    assert cli.parse(words[3:]) == run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiny sofia", "Did you mean sophia"),
        ("resum runs", "Did you mean resume"),
        ("resume nowhere", "nowhere does not exist"),
        ("tiny --run.folder /dev/null/run", "Choose a folder that can be written"),
        ("tiny --mesh.fsdp 3", "does not use 8 devices exactly"),
        ("tiny --batch-size 12", "does not divide over 8 devices"),
    ],
)
def test_a_mistake_ends_with_one_line_that_names_the_cure(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        cli.main(words.split())


def test_the_help_names_every_model_optimizer_and_flag():
    command = [sys.executable, "-m", "train", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("gpt2-770m", "muon", "resume RUN", "--optim.gamma", "--mesh.fsdp", "--steps"):
        assert word in text
