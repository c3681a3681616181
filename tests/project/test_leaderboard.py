"""The comparison of optimizers: its search, its file of finished runs, and its table."""

import dataclasses
import itertools
import json
import math
import shlex

import pytest
from rich.console import Console

import train
from benchmarks import leaderboard, rate_search
from models import DecoderConfig
from train import data
from train.config.schema import OutputConfig

QUIET = Console(quiet=True)


SMALL = {
    "model": DecoderConfig(vocab_size=256, context=16, width=16, layers=1, heads=2),
    "batch_size": 8,
    "sequence_length": 16,
}


@pytest.fixture
def board(monkeypatch):
    """The runs that a sweep trained; losses are lowest at rate .02 and grow with the seed."""
    trained = []

    def measure(run, after_step=None):
        trained.append(run)
        loss = 1 + abs(math.log2(run.optim.learning_rate / 0.02)) + run.seed
        return {"heldout_loss": loss, "state_bytes": 8.0, "seconds": 0.1, "command": run.name}

    monkeypatch.setattr(rate_search, "measure", measure)
    monkeypatch.setattr(leaderboard.program, "use_compile_cache", lambda folder: None)
    return trained


@pytest.mark.parametrize("best", [3e-4, 0.9e-3, 2e-3, 7e-3, 0.1])
def test_the_search_ends_when_both_neighbours_of_the_best_rate_are_worse(best):
    losses = rate_search.search(lambda rate: abs(math.log(rate / best)), (1e-3, 2e-3, 4e-3))
    rates = list(losses)
    assert rates == sorted(rates)
    i = rates.index(min(losses, key=losses.get))
    assert rates[i - 1] < best < rates[i + 1] and 0 < i < len(rates) - 1
    assert all(b == pytest.approx(2 * a) for a, b in itertools.pairwise(rates))


def test_the_search_ends_if_every_rate_diverges():
    losses = rate_search.search(lambda rate: math.inf, (1e-3, 2e-3, 4e-3))
    assert len(losses) == rate_search.MOST_RATES


def test_runs_differ_only_in_the_optimizer():
    runs = [rate_search.candidate(name, 0.01, steps=400, seed=1) for name in rate_search.GRIDS]
    assert {run.optim.weight_decay for run in runs} == {0.1}
    assert {run.optim.learning_rate for run in runs} == {0.01}
    assert len({dataclasses.replace(run, optim=runs[0].optim).hash for run in runs}) == 1
    assert runs[0].warmup_steps / 400 == pytest.approx(100 / 1200, rel=0.02)
    grids = rate_search.GRIDS.values()
    assert all(b == 2 * a and c == 2 * b for a, b, c in grids)


def test_an_interrupted_sweep_continues_and_a_wider_one_reuses_its_runs(
    board, tmp_path, monkeypatch
):
    grids = {"adamw": (5e-3, 1e-2, 2e-2), "muon": (1e-2, 2e-2, 4e-2)}
    monkeypatch.setattr(rate_search, "GRIDS", grids)
    path, budget = tmp_path / "new" / "runs.json", {"steps": 400, "seeds": 1}
    measure = rate_search.measure

    def cut(run, **kwargs):
        if len(board) == 2:
            raise KeyboardInterrupt
        return measure(run, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(rate_search, "measure", cut)
        with pytest.raises(SystemExit, match=r"finished runs are in .*runs\.json"):
            leaderboard.main(["--optimizers", "adamw", "--json", str(path)])
    assert len(json.loads(path.read_text())) == len(board) == 2
    rows = rate_search.sweep(["adamw"], path, QUIET, **budget)
    assert [run.optim.learning_rate for run in board] == [5e-3, 1e-2, 2e-2, 4e-2]
    assert rows["adamw"]["rate"] == 0.02
    assert (rows["adamw"]["half"], rows["adamw"]["twice"]) == (2, 2)
    wide = rate_search.sweep(["adamw", "muon"], path, QUIET, **budget | {"seeds": 3})
    assert wide["adamw"]["losses"] == [1, 2, 3]
    assert [(run.name, run.seed) for run in board[4:]] == [
        ("tiny-adamw", 1),
        ("tiny-adamw", 2),
        *[("tiny-muon", 0)] * 3,
        ("tiny-muon", 1),
        ("tiny-muon", 2),
    ]


def test_the_table_is_ranked_and_ends_with_a_command_that_runs(board, tmp_path, capsys):
    file = ["--json", str(tmp_path / "runs.json")]
    leaderboard.main(["--optimizers", "soaa", "lion", "--seeds", "3", *file])
    out = capsys.readouterr().out
    assert "lion: best at 0.0192; its preset has 0.0003." in out
    lines = [line for line in out.splitlines() if line.startswith("│ ")]
    assert [line.split()[1] for line in lines] == ["soaa", "lion"]
    last = shlex.split(out.splitlines()[-1])
    assert last[1:3] == ["-m", "benchmarks.leaderboard"]
    done = len(board)
    leaderboard.main(last[3:])
    assert {run.steps for run in board[done:]} == {1200}


def test_differences_are_paired_by_seed():
    assert leaderboard.difference([2.0, 3.0, 4.5], [1.0, 2.0, 3.0]) == "+1.167 ± 0.167"
    assert leaderboard.difference([2.0], [2.5]) == "-0.500"
    assert leaderboard.difference([math.inf, 1.0], [1.0, 1.0]) == "+inf"


def test_the_time_of_a_step_includes_curvature_but_not_compilation():
    times = {True: [60.0, 4.0], False: [50.0, 1.0, 9.0, 1.0]}
    assert rate_search.seconds_per_step(times) == pytest.approx((2 * 4 + 4 * 1) / 6)


def test_a_file_without_runs_is_rejected(board, tmp_path):
    (tmp_path / "runs.json").write_text("[")
    with pytest.raises(SystemExit, match=r"runs\.json holds no finished runs .*delete it"):
        leaderboard.main(["--json", str(tmp_path / "runs.json")])


@pytest.mark.slow
def test_the_losses_are_those_of_the_trainer(tmp_path, monkeypatch):
    whole = data.shakespeare()
    shorter = whole._replace(heldout=whole.heldout[:2000])
    monkeypatch.setattr(data.embedded, "shakespeare", lambda: shorter)
    monkeypatch.setattr(rate_search, "GRIDS", {"sophia-g": (3e-3,), "lion": (3e-4,)})
    monkeypatch.setattr(rate_search, "MOST_RATES", 1)
    path = tmp_path / "runs.json"
    rows = rate_search.sweep(["sophia-g", "lion"], path, QUIET, steps=6, seeds=1, **SMALL)
    assert rows["sophia-g"]["state_bytes"] == pytest.approx(8, rel=0.01)
    assert rows["lion"]["state_bytes"] == pytest.approx(4, rel=0.01)
    shown = OutputConfig(folder=str(tmp_path / "run"), quiet=True, compile_cache="")
    run = rate_search.candidate("sophia-g", 3e-3, steps=6, seed=0, output=shown, **SMALL)
    assert rows["sophia-g"]["losses"] == [train.train(run)[-1]["heldout_loss"]]
    assert json.loads(path.read_text())[run.hash]["command"].startswith("python -m train tiny")


def test_a_diverged_run_has_an_infinite_loss_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(rate_search, "GRIDS", {"lion": (1e38,)})
    monkeypatch.setattr(rate_search, "MOST_RATES", 1)
    path = tmp_path / "runs.json"
    row = rate_search.sweep(["lion"], path, QUIET, steps=3, seeds=1, **SMALL)["lion"]
    assert row["losses"] == [math.inf]
    (kept,) = json.loads(path.read_text(), parse_constant=pytest.fail).values()
    assert kept["heldout_loss"] is None
