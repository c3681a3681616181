"""A signal is heard wherever a run is: what was done is saved, and no evaluation is lost."""

import os
import signal

import pytest
from small_run import change_programs, output, small

import train
from train import evaluate, generate
from train.checkpoint import run_folder
from train.checkpoint.autosave import Autosave
from train.checkpoint.store import Checkpoints
from train.config import serialize
from train.data.rows import Data
from train.logging import jsonl
from train.parallel import signals


def told():
    os.kill(os.getpid(), signal.SIGTERM)


def of(folder, **changes):
    return small(folder, "adamw", **{"steps": 8, "evaluate_every": 4, **changes})


def rows(history):
    """Without what a clock measured."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in history]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return rows(train.train(of(tmp_path_factory.mktemp("runs") / "whole")))


def stopped(run, folder):
    """The step at which a run says that it stopped, which is saved."""
    with pytest.raises(signals.Stopped) as found:
        train.train(run)
    with run_folder.checkpoints(run, folder) as checkpoints:
        assert checkpoints.latest == found.value.step
    return found.value.step


@pytest.mark.parametrize("at", [1, 2])
def test_in_an_evaluation_within_a_batch_and_it_is_made_up_for(at, whole, tmp_path, monkeypatch):
    """The first, or that of the last step; the resumed run is the run that was not stopped."""
    heldout, begun, read = Data.heldout, [], []

    def slow(data, batches=None):
        begun.append(True)
        for number, batch in enumerate(heldout(data, batches)):
            read.append((len(begun), number))
            if len(begun) == at and number == 1:
                told()
            yield batch

    monkeypatch.setattr(Data, "heldout", slow)
    assert stopped(of(tmp_path / "run"), tmp_path / "run") == 4 * at
    assert read[-1] == (at, 1)  # none was read after it
    evaluated = [
        row["step"] for row in jsonl.read_history(tmp_path / "run") if "bits_per_byte" in row
    ]
    assert evaluated == [4][: at - 1]
    assert rows(train.resume(tmp_path / "run")) == whole


def test_while_a_program_compiles_before_the_next_one(tmp_path, monkeypatch):
    compiled = []

    def slow(compile):
        def compiles(due):
            compiled.append(due.refresh)
            told()
            return compile(due)

        return compiles

    change_programs(monkeypatch, compile=slow)
    assert stopped(small(tmp_path / "run", "sophia-g", steps=8), tmp_path / "run") == 0
    assert compiled == [True]
    assert serialize.load(tmp_path / "run").steps == 8  # it can be resumed


def test_while_a_state_is_saved(whole, tmp_path, monkeypatch):
    save, seen = Autosave.save, []

    def slow(keep, step, *args, **how):
        if step == 6 and not seen:
            seen.append(step)
            told()
        save(keep, step, *args, **how)

    monkeypatch.setattr(Autosave, "save", slow)
    assert stopped(of(tmp_path / "run"), tmp_path / "run") == 7
    assert rows(train.resume(tmp_path / "run")) == whole


def test_while_a_sample_is_drawn_which_is_left_out(whole, tmp_path, monkeypatch, capsys):
    """The run is done: it ends as one that was not told."""
    sample, before = generate.sample, signal.getsignal(signal.SIGTERM)

    def slow(*args, **how):
        told()
        return sample(*args, **how)

    monkeypatch.setattr(generate, "sample", slow)
    assert rows(train.train(output(of(tmp_path / "run"), quiet=False))) == whole
    assert not (tmp_path / "run" / "sample.txt").exists()
    assert "to train longer" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_state_is_saved_before_it_is_evaluated_and_the_best_is_kept(tmp_path, monkeypatch):
    """Evaluated at 2, 4, ..., saved at the same steps: the best of them, and the last."""
    events = []
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 4.0}

    def evaluate(params, **how):
        step = 2 * sum(kind == "evaluated" for kind, _ in events) + 2
        events.append(("evaluated", step))
        return {"heldout_loss": losses[step]}

    def saving(checkpoints, step, *args, **how):
        events.append(("saved", step))
        return save(checkpoints, step, *args, **how)

    save = Checkpoints.save
    change_programs(monkeypatch, evaluate=lambda own: evaluate)
    monkeypatch.setattr(Checkpoints, "save", saving)
    run = of(tmp_path / "run", evaluate_every=2)
    train.train(output(run, checkpoint_every=2, keep_checkpoints=1))
    assert events == [(kind, step) for step in (2, 4, 6, 8) for kind in ("saved", "evaluated")]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["4", "8"]
    train.resume(tmp_path / "run", steps=9)  # which knows the losses from the metrics
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["4", "9"]


@pytest.mark.parametrize(("tokens", "want"), [(1, 1), (128, 1), (300, 3), (0, None)])
def test_an_evaluation_reads_whole_batches(tokens, want):
    """Of 8 rows of 16 tokens."""
    assert evaluate.batches(output(of("unused"), evaluate_tokens=tokens)) == want


def test_the_last_evaluation_reads_all(tmp_path, monkeypatch):
    heldout, asked = Data.heldout, []

    def noted(data, batches=None):
        asked.append(batches)
        return heldout(data, batches)

    monkeypatch.setattr(Data, "heldout", noted)
    train.train(output(of(tmp_path / "run"), evaluate_tokens=300))
    assert asked == [3, None]
