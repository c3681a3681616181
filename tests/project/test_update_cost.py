"""The benchmarks of updates: bytes against formulas, times against a known clock."""

import functools
import itertools
import json

import pytest

from benchmarks import matrix_cost, update_cost


@functools.cache
def row(name):
    """Figures of one update without timing; leaves are 1024 x 512."""
    return update_cost.measure(name, update_cost.cases()[name], 8 * 1024 * 512, rounds=0, limit=0.0)


FLOORS = {  # bytes per parameter: each input read once, each output written once
    "optax.sgd": 12,
    "optax.adamw": 28,
    "optax.lion": 20,
    "sophia_g, between refreshes": 24,
    "sophia_g, refresh, statistics on": 32,
    "sophia_g, between refreshes, bfloat16": 18,
    "sophia_lite, bfloat16": 20,
}


@pytest.mark.parametrize("name", FLOORS)
def test_the_floor_reads_each_input_and_writes_each_output_once(name):
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
    """28 bytes between refreshes: g, m -> m and p, m, h -> p."""
    assert row(name)["bytes_per_parameter"] <= MOVED[name] + 0.1
    assert row(name)["temporary_megabytes"] < 0.02


def test_the_chain_costs_as_much_as_one_function():
    by_hand = row("Sophia by hand, between refreshes")["bytes_per_parameter"]
    chain = row("sophia_g, between refreshes")["bytes_per_parameter"]
    assert chain == pytest.approx(by_hand, rel=1e-3)
    assert chain < row("optax.adamw")["bytes_per_parameter"]


@pytest.mark.parametrize("states", ["", ", bfloat16"])
def test_statistics_allocate_no_array_and_the_mean_update_costs_less_than_adamw(states):
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


def test_max_norm_saves_the_passes_of_a_separate_clip():
    within, before = (row(f"sophia_geometric, clip by norm {x}") for x in ("within", "before"))
    assert within["bytes_per_parameter"] <= before["bytes_per_parameter"] - 4
    assert within["flops_per_parameter"] < before["flops_per_parameter"]


def test_a_time_is_a_median_or_the_mean_of_whole_periods():
    def clock(times):
        return itertools.chain([99.0], itertools.cycle(times))  # the first update warms up

    ones = itertools.repeat(1.0)
    twice = [2.0, 2.0, 7.0]
    assert update_cost.time_ratio(clock(twice), ones, 9, 60.0, 1) == 2
    assert update_cost.time_ratio(clock(twice), ones, 8, 60.0, 3) == pytest.approx(11 / 3)
    assert update_cost.time_ratio(clock(twice), ones, 8, 0.0, 3) is None


def test_the_table_and_the_json_file_have_every_row(tmp_path, monkeypatch, capsys):
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


def test_blocks_of_rows_cost_a_fraction_of_muon_and_half_its_state():
    """Nine Newton-Schulz steps on two blocks of 128 rows, and two products with each block."""
    ours, muon = (
        matrix_cost.measure(name, (256, 512)) for name in ("orthosoph", "optax.contrib.muon")
    )
    steps = 9 * 3 * 2 * (2 * 128**3)
    products = 2 * 2 * 128 * 256 * 512
    assert 1e9 * ours["gigaflops"] == pytest.approx(steps + products, rel=0.1)
    assert ours["gigaflops"] < muon["gigaflops"] / 2
    assert ours["state"] == pytest.approx(muon["state"] / 2, rel=0.01)
