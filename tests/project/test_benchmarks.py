import dataclasses
import functools
import itertools
import json
import math
import shlex

import pytest
from rich.console import Console

import train
from benchmarks import estimator_variance, leaderboard, matrix_cost, rate_search, update_cost
from models import DecoderConfig
from train import data
from train.config.schema import OutputConfig


@functools.cache
def row(name):
    """Its bytes; leaves of 1024 x 512."""
    return update_cost.measure(name, update_cost.cases()[name], 8 * 1024 * 512, rounds=0, limit=0.0)


FLOORS = {  # each input read once, each output written once, in bytes a parameter
    "optax.sgd": 12,
    "optax.adamw": 28,
    "optax.lion": 20,
    "sophia_g, between refreshes": 24,
    "sophia_g, refresh, statistics on": 32,
    "sophia_g, between refreshes, bfloat16": 18,
    "sophia_lite, bfloat16": 20,
}


@pytest.mark.parametrize("name", FLOORS)
def test_the_floor_is_what_a_step_written_as_one_loop_would_move(name):
    assert row(name)["floor"] == pytest.approx(FLOORS[name], abs=0.01)


MOVED = {
    "sophia_h, between refreshes": 28,
    "sophia_g, between refreshes": 28,
    "sophia_g, clip by norm, between refreshes": 32,
    "sophia_g, refresh, statistics off": 44,
    "sophia_lite": 40,
    "sophia_geometric": 44,
    "sophia_geometric, clip by norm within": 44,
    "sophia_g, between refreshes, bfloat16": 20,
    "sophia_g, refresh, statistics off, bfloat16": 32,
    "sophia_lite, bfloat16": 28,
    "sophia_geometric, bfloat16": 32,
}


@pytest.mark.parametrize("name", MOVED)
def test_an_update_has_a_loop_for_each_output_and_no_temporaries(name):
    """Twenty-eight bytes between refreshes: g, m -> m and p, m, h -> p."""
    assert row(name)["bytes_per_parameter"] <= MOVED[name] + 0.1
    assert row(name)["temporary_megabytes"] < 0.02


def test_the_chain_costs_what_a_function_written_by_hand_costs():
    by_hand = row("Sophia by hand, between refreshes")["bytes_per_parameter"]
    chain = row("sophia_g, between refreshes")["bytes_per_parameter"]
    assert chain == pytest.approx(by_hand, rel=1e-3)
    assert chain < row("optax.adamw")["bytes_per_parameter"]


@pytest.mark.parametrize("states", ["", ", bfloat16"])
def test_statistics_on_refreshes_keep_no_array_and_cost_less_than_adamw_on_average(states):
    between, on, off = (
        row(f"sophia_g, {x}{states}")
        for x in ("between refreshes", "refresh, statistics on", "refresh, statistics off")
    )
    share = 4 * 8 * 1024 * 512 / 64 / 1e6
    assert off["temporary_megabytes"] < on["temporary_megabytes"] < 10 * share
    mean = update_cost.average(between, on)
    assert mean["bytes_per_parameter"] == pytest.approx(
        0.9 * between["bytes_per_parameter"] + 0.1 * on["bytes_per_parameter"]
    )
    assert mean["bytes_per_parameter"] < 0.8 * row("optax.adamw")["bytes_per_parameter"]


def test_a_clip_within_saves_the_passes_of_a_clip_before():
    within, before = (row(f"sophia_geometric, clip by norm {x}") for x in ("within", "before"))
    assert within["bytes_per_parameter"] <= before["bytes_per_parameter"] - 4
    assert within["flops_per_parameter"] < before["flops_per_parameter"]


def test_time_is_a_median_and_over_refreshes_a_mean_of_whole_periods():
    def clock(times):
        return itertools.chain([99.0], itertools.cycle(times))  # the first one warms up

    ones = itertools.repeat(1.0)
    twice = [2.0, 2.0, 7.0]
    assert update_cost.time_ratio(clock(twice), ones, 9, 60.0, 1) == 2
    assert update_cost.time_ratio(clock(twice), ones, 8, 60.0, 3) == pytest.approx(11 / 3)
    assert update_cost.time_ratio(clock(twice), ones, 8, 0.0, 3) is None


def test_the_table_and_its_json_hold_every_row(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--only", "sophia_h", "--size", "131072", "--rounds", "2", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["update_cost", *arguments])
    update_cost.main()
    rows = json.loads(path.read_text())["131072"]
    names = ("between refreshes", "refresh, statistics on", "mean of 10")
    assert list(rows) == [f"sophia_h, {x}{y}" for y in ("", ", bfloat16") for x in names]
    assert all(x["time_over_adamw"] > 0 and None not in x.values() for x in rows.values())
    out = capsys.readouterr().out
    assert out.count("sophia_h") == len(rows) and "0.1 M float32" in out


QUIET = Console(quiet=True)
SMALL = {
    "model": DecoderConfig(vocab_size=256, context=16, width=16, layers=1, heads=2),
    "batch_size": 8,
    "sequence_length": 16,
}


@pytest.fixture
def board(monkeypatch):
    """What a sweep trained, with a loss that is best at rate .02 and grows with the seed."""
    trained = []

    def measure(run, after_step=None):
        trained.append(run)
        loss = 1 + abs(math.log2(run.optim.learning_rate / 0.02)) + run.seed
        return {"heldout_loss": loss, "state_bytes": 8.0, "seconds": 0.1, "command": run.name}

    monkeypatch.setattr(rate_search, "measure", measure)
    monkeypatch.setattr(leaderboard.program, "use_compile_cache", lambda folder: None)
    return trained


@pytest.mark.parametrize("best", [3e-4, 0.9e-3, 2e-3, 7e-3, 0.1])
def test_the_search_ends_with_the_best_rate_between_worse_ones(best):
    losses = rate_search.search(lambda rate: abs(math.log(rate / best)), (1e-3, 2e-3, 4e-3))
    rates = list(losses)
    assert rates == sorted(rates)
    i = rates.index(min(losses, key=losses.get))
    assert rates[i - 1] < best < rates[i + 1] and 0 < i < len(rates) - 1
    assert all(b == pytest.approx(2 * a) for a, b in itertools.pairwise(rates))


def test_the_search_gives_up_where_no_rate_trains():
    losses = rate_search.search(lambda rate: math.inf, (1e-3, 2e-3, 4e-3))
    assert len(losses) == rate_search.MOST_RATES


def test_all_optimizers_train_on_equal_terms():
    runs = [rate_search.candidate(name, 0.01, steps=400, seed=1) for name in rate_search.GRIDS]
    assert {run.optim.weight_decay for run in runs} == {0.1}
    assert {run.optim.learning_rate for run in runs} == {0.01}
    assert len({dataclasses.replace(run, optim=runs[0].optim).hash for run in runs}) == 1
    assert runs[0].warmup_steps / 400 == pytest.approx(100 / 1200, rel=0.02)
    grids = rate_search.GRIDS.values()
    assert all(b == 2 * a and c == 2 * b for a, b, c in grids)


def test_an_interrupted_sweep_goes_on_and_a_wider_one_reuses_it(board, tmp_path, monkeypatch):
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


def test_the_board_is_ranked_and_ends_with_a_command_that_goes_on(board, tmp_path, capsys):
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


def test_a_difference_is_taken_seed_by_seed():
    assert leaderboard.difference([2.0, 3.0, 4.5], [1.0, 2.0, 3.0]) == "+1.167 ± 0.167"
    assert leaderboard.difference([2.0], [2.5]) == "-0.500"
    assert leaderboard.difference([math.inf, 1.0], [1.0, 1.0]) == "+inf"


def test_compiling_is_no_step_and_samples_of_curvature_are_charged():
    times = {True: [60.0, 4.0], False: [50.0, 1.0, 9.0, 1.0]}
    assert rate_search.seconds_per_step(times) == pytest.approx((2 * 4 + 4 * 1) / 6)


def test_a_file_that_holds_no_runs_is_refused(board, tmp_path):
    (tmp_path / "runs.json").write_text("[")
    with pytest.raises(SystemExit, match=r"runs\.json holds no finished runs .*delete it"):
        leaderboard.main(["--json", str(tmp_path / "runs.json")])


@pytest.mark.slow
def test_the_board_has_the_losses_that_the_trainer_reaches(tmp_path, monkeypatch):
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


def test_a_run_that_diverges_is_infinitely_bad_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(rate_search, "GRIDS", {"lion": (1e38,)})
    monkeypatch.setattr(rate_search, "MOST_RATES", 1)
    path = tmp_path / "runs.json"
    row = rate_search.sweep(["lion"], path, QUIET, steps=3, seeds=1, **SMALL)["lion"]
    assert row["losses"] == [math.inf]
    (kept,) = json.loads(path.read_text(), parse_constant=pytest.fail).values()
    assert kept["heldout_loss"] is None


@pytest.mark.slow
def test_groups_divide_the_error_at_the_same_cost_and_leave_no_bias(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    arguments = ["--width", "8", "--steps", "100", "--samples", "100", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["estimator_variance", *arguments])
    estimator_variance.main()
    rows = json.loads(path.read_text())
    biased = rows.pop("squared gradient")
    assert biased["bias_of_sum"] > 4 * biased["bias_standard_error"]
    for name, row in rows.items():
        assert abs(row["bias_of_sum"]) < 5 * row["bias_standard_error"] < 0.25, name
    one, four, sixteen = (rows[f"GNB, {n}"] for n in ("1 group", "4 groups", "16 groups"))
    for error in ("total_error", "median_error"):
        assert one[error] == pytest.approx(2, rel=0.4)
        assert one[error] > 2.5 * four[error] > 2.5 * 2 * sixteen[error]
    assert 0.95 < sixteen["cost_in_gradients"] / one["cost_in_gradients"] < 1.05
    assert 0.9 < one["cost_in_gradients"] < 1.3
    hutchinson = rows["Hutchinson, Rademacher"]
    assert 2 < hutchinson["cost_in_gradients"] < 4
    assert hutchinson["error_times_cost"] > 50 * sixteen["error_times_cost"]


def test_blocks_of_rows_cost_a_fraction_of_muon_and_half_its_state():
    """Nine steps of Newton-Schulz on 2 x 128 rows, two products of each block with its matrix."""
    ours, muon = (
        matrix_cost.measure(name, (256, 512)) for name in ("orthosoph", "optax.contrib.muon")
    )
    steps = 9 * 3 * 2 * (2 * 128**3)
    products = 2 * 2 * 128 * 256 * 512
    assert 1e9 * ours["gigaflops"] == pytest.approx(steps + products, rel=0.1)
    assert ours["gigaflops"] < muon["gigaflops"] / 2
    assert ours["state"] == pytest.approx(muon["state"] / 2, rel=0.01)
