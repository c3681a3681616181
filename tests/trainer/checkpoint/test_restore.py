"""Where a run that is resumed begins, and what may not be resumed."""

import dataclasses
import json
import os
import shutil
import signal

import jax.numpy as jnp
import pytest
from small_run import losses, output, small

import train
from train import program
from train.checkpoint import restore, run_folder, store, validate, warm_start
from train.checkpoint.errors import CheckpointError
from train.config import serialize
from train.logging import jsonl
from train.logging.throughput import Meter
from train.parallel import processes


def test_a_run_that_saved_nothing_yet_starts_again_but_a_lost_checkpoint_is_named(tmp_path, capsys):
    run = output(small(tmp_path / "run", "adamw", steps=4), quiet=False, sample_length=0)
    history = train.train(run)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert losses(train.resume(tmp_path / "run")) == losses(history)
    shown = capsys.readouterr().out
    (aside,) = (tmp_path / "run").glob("metrics-*.jsonl")
    assert "no checkpoint yet: starting from step 0" in shown
    assert f"the metrics up to step 4 are now in {aside}" in shown
    assert [json.loads(line) for line in aside.read_text().splitlines()] == history
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 1.0}\n')  # of a run that must have saved by then
    with pytest.raises(CheckpointError, match="does not exist"):
        train.resume(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "checkpoints" / "put-aside-4").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train.resume(tmp_path / "run")


def test_checkpoints_come_by_the_clock_too(tmp_path):
    run = small(tmp_path / "run", "adamw", steps=4)
    train.train(output(run, checkpoint_minutes=1e-9, keep_checkpoints=9))
    with run_folder.checkpoints(run, tmp_path / "run") as checkpoints:
        assert checkpoints.steps == [1, 2, 3, 4]


def test_processes_must_find_the_same_data(finished, tmp_path, monkeypatch):
    """Compared with what the others found before anything is compiled, or a checkpoint read."""
    run, said = small(tmp_path / "run"), processes.check_same

    def compare(fields):
        said(fields)
        if "data" in fields:
            raise ValueError(f"data {fields['data']} is another")

    monkeypatch.setattr(processes, "check_same", compare)
    monkeypatch.setattr(store.Checkpoints, "restore", None)
    fingerprint = program.assemble(run).data().fingerprint
    for begin in (lambda: train.train(run), lambda: train.resume(finished[0])):
        with pytest.raises(ValueError, match=f"data {fingerprint} is another"):
            begin()


def test_processes_must_go_on_from_one_checkpoint(finished, monkeypatch):
    said = []
    monkeypatch.setattr(processes, "check_same", lambda *words: said.append(words))
    train.resume(finished[0], step=12)
    assert said[0][0]["allow_changes"] is False
    (cure,) = [words[1] for words in said if words[0] == {"checkpoint": 12}]
    assert "an older one with --step" in cure


def test_the_first_signal_does_not_end_the_last_save(tmp_path, monkeypatch):
    close = store.Checkpoints.close

    def told(checkpoints):
        if (tmp_path / "run" / "config.json").exists() and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        close(checkpoints)

    asked = []
    monkeypatch.setattr(store.Checkpoints, "close", told)
    assert max(losses(train.train(small(tmp_path / "run", "adamw", steps=4)))) == 4
    assert asked


def test_a_run_that_went_back_stays_there_though_it_is_killed_before_it_saves(
    finished, tmp_path, monkeypatch
):
    folder, begun, restored = tmp_path / "run", [], restore.restored
    shutil.copytree(finished[0], folder)

    def killed(*args):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "report", killed)
        with pytest.raises(InterruptedError):
            train.resume(folder, step=6)
    assert max(losses(jsonl.read_history(folder))) == 6  # those of the other future are cut

    def noted(*args, **how):
        start = restored(*args, **how)
        begun.append((int(start.state.step), start.notes))
        return start

    monkeypatch.setattr(restore, "restored", noted)
    train.resume(folder)
    assert begun == [(6, ())]


def test_a_taken_folder_is_refused(finished):
    with pytest.raises(ValueError, match="already holds a run"):
        train.train(small(finished[0]))


def test_parameters_that_are_not_finite_stop_the_run_and_spare_the_good_checkpoint(tmp_path):
    folder = tmp_path / "run"
    train.train(small(folder, "adamw", steps=6))
    run = serialize.load(folder)
    hot = dataclasses.replace(run.optim, learning_rate=1e30, weight_decay=1e30)
    hot_run = dataclasses.replace(run, optim=hot)
    serialize.save(output(hot_run, checkpoint_every=1, keep_checkpoints=1), folder)
    with pytest.raises(ValueError, match=r"step 6: optim.learning_rate 0\.01 -> 1e\+30.*Put back"):
        train.resume(folder, steps=12)
    with pytest.raises(FloatingPointError, match=r"at step 7, .* not saved.*step 6 is kept"):
        train.resume(folder, steps=12, allow_changes=True)
    with run_folder.checkpoints(run, folder) as checkpoints:
        assert checkpoints.steps == [6]


def test_a_checkpoint_whose_parameters_are_not_finite_is_passed_over(tmp_path, monkeypatch):
    """Such are never saved: it was damaged on disk."""
    folder, problem = tmp_path / "run", validate.problem
    train.train(output(small(folder, "adamw", steps=6), checkpoint_every=3))

    def damaged_at_6(step, state):
        tokens = state["params"]["tokens"]["embedding"] * (jnp.nan if step == 6 else 1)
        return problem(step, state | {"params": state["params"] | {"tokens": tokens}})

    monkeypatch.setattr(validate, "problem", damaged_at_6)
    loaded = warm_start.load(folder)
    assert loaded.step == 3
    assert "step 6 is damaged (params/tokens is not finite" in loaded.notes[0]


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path):
    folder = tmp_path / "run"
    train.train(output(small(folder, "adamw", steps=6), checkpoint_every=3))
    checkpoints = folder / "checkpoints"
    (checkpoints / "3").rename(checkpoints / "5")
    shutil.rmtree(checkpoints / "6")
    shutil.copytree(checkpoints / "5", checkpoints / "3")
    loaded = warm_start.load(folder)
    assert loaded.step == 3
    assert "step 5 is damaged (it holds the state of step 3)" in loaded.notes[0]
