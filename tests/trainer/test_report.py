"""The end of a run: the next command, and what AdamW reached with the same budget."""

import dataclasses
import json

import pytest
from small_run import output, small

import train
from train import baseline, report
from train.config import command_line
from train.config.presets import preset
from train.parallel import processes


def test_the_last_line_is_the_command_that_goes_on(tmp_path, capsys):
    folder = tmp_path / "[lr=.01]" / "[" / "run"
    train.train(output(small(folder, steps=3), quiet=False))
    lines = capsys.readouterr().out.strip().splitlines()
    command = f"{command_line.python()} -m train resume '{folder}' --steps 6"
    assert lines[-1] == command
    assert f"curves: {folder}/loss.png" in lines
    assert "bits a byte on held-out text" in "\n".join(lines)
    assert (folder / "sample.txt").read_text().startswith("HAMLET.")


@pytest.mark.parametrize(("optimizer", "offered"), [("adamw", False), ("lion", True)])
def test_adamw_is_not_offered_as_its_own_reference(optimizer, offered):
    run = small("unused", optimizer)
    shown = report.comparison(run, None, "")
    assert ("--output.recompute-reference" in shown) == offered
    assert not report.comparison(run, None, "stopped at step 3")


def test_the_reference_is_adamw_with_the_same_budget_and_goes_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "OWN", tmp_path / "references.json")
    monkeypatch.chdir(tmp_path)
    run = small("", "adamw", steps=4)  # which is its own twin, begun in the same second
    assert baseline.find(run).stale and baseline.is_twin(run)
    shipped = baseline.SHIPPED.read_bytes()
    train.train(output(run, recompute_reference=True))
    folder, beside = sorted((tmp_path / "runs").iterdir())
    assert beside.name == f"{folder.name}-reference"
    found = baseline.find(run)
    assert not found.stale
    assert found.command.startswith("python -m train tiny adamw --model.context 16")
    assert found.heldout[-1][0] == 4
    other_optimizer = dataclasses.replace(run, optim=preset("tiny", "lion").optim)
    assert not baseline.find(other_optimizer).stale
    assert baseline.SHIPPED.read_bytes() == shipped  # which belongs to the source
    assert baseline.find(dataclasses.replace(run, steps=5)).stale


def test_a_process_without_the_history_stores_no_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "OWN", tmp_path / "references.json")
    monkeypatch.setattr(processes, "is_main", lambda: False)
    baseline.recompute(small(""), tmp_path / "run", lambda run: [])
    assert not baseline.OWN.exists()


def test_the_shipped_reference_belongs_to_the_shipped_config():
    found = baseline.find(preset())
    assert found is not None
    assert not found.stale, (
        f"renew it: python -m train --output.recompute-reference ({found.command}), then copy "
        f"{baseline.OWN} over {baseline.SHIPPED}"
    )
    assert json.loads(baseline.SHIPPED.read_text())[baseline.twin(preset()).hash]
