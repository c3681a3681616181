"""The benchmark of curvature's cost: counts against formulas."""

import dataclasses
import functools
import json

import pytest

from benchmarks import curvature_cost
from models import PRESETS

PAPER = {"rows": 480, "length": 1024}


SHALLOW = dataclasses.replace(PRESETS["tiny"], layers=1)


@functools.cache
def paper_step(model, refresh):
    """XLA's count of a step with the paper's batch; a refresh samples an eighth of the rows."""
    sampler = curvature_cost.gauss_newton(8)
    return curvature_cost.flops(curvature_cost.lower(PRESETS[model], sampler, refresh, **PAPER))


@pytest.mark.parametrize("model", ["gpt2-30m", "gpt2-125m"])
def test_xla_and_the_formula_agree_on_a_plain_step(model):
    by_hand = curvature_cost.model_flops(PRESETS[model], **PAPER)
    assert paper_step(model, False) == pytest.approx(by_hand, rel=0.02)


@pytest.fixture(scope="module")
def operations():
    """Two layers only: the claims hold at any depth, and lowering time grows with the layers."""
    config = dataclasses.replace(PRESETS["gpt2-30m"], layers=2)
    return curvature_cost.operations(config, 480, 1024, (1, 8))


@pytest.mark.parametrize(("share", "n"), [("all rows", 1), ("1/8", 8)])
def test_a_sample_costs_two_thirds_of_a_plain_step_on_its_rows(operations, share, n):
    """A backward pass costs two forward passes; the forward pass itself is shared."""
    row = operations[f"Sophia-G, {share}"]
    assert row["plain_steps"] - 1 == pytest.approx(2 / 3 / n, rel=0.02)


def test_an_eighth_of_the_papers_batch_every_ten_steps_adds_under_one_percent():
    plain, refresh = (paper_step("gpt2-125m", x) for x in (False, True))
    assert 0.005 < curvature_cost.amortized(refresh, plain, 10) <= 0.01


def test_groups_cost_no_operations(operations):
    one, four = (operations[f"Sophia-G, all rows{groups}"] for groups in ("", ", 4 groups"))
    assert four["flops"] == pytest.approx(one["flops"], rel=1e-3)


def test_a_hessian_vector_product_of_all_rows_every_ten_steps_adds_a_fifth(operations):
    """Forward over reverse: a gradient costs three units, and its derivative six more."""
    assert operations["Sophia-H, all rows"]["overhead_at_10"] == pytest.approx(0.2, rel=0.01)
    eighth = operations["Sophia-H, 1/8"]["plain_steps"] - 1
    assert 2 / 8 < eighth < 3 / 8


def test_an_overhead_is_amortized_over_the_interval():
    assert curvature_cost.amortized(15.0, 10.0, 1) == pytest.approx(0.5)
    assert curvature_cost.amortized(15.0, 10.0, 20) == pytest.approx(0.025)


def test_steps_with_lax_cond_are_divided_by_whether_they_sample():
    times = {"plain": [1.0, 2.0, 1.0, 2.0], "lax.cond": [2.0, 6.0, 2.0, 6.0]}
    figures = curvature_cost.in_plain_steps(times)
    assert figures["lax.cond, no sample due"]["plain_steps"] == 2
    assert figures["lax.cond, 1/8"]["plain_steps"] == 3
    assert figures["plain"] == {"plain_steps": 1, "seconds": 1.5}


@pytest.mark.slow
def test_all_tables_are_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", SHALLOW)
    path = tmp_path / "cost.json"
    sizes = ["--batch", "8", "--length", "64", "--time-batch", "8", "--rounds", "2"]
    models = ["--models", "tiny", "--compile", "tiny", "--time", "tiny"]
    curvature_cost.main([*models, *sizes, "--json", str(path)])
    out, result = capsys.readouterr().out, json.loads(path.read_text())
    assert "Sophia-H, 1/8" in out and "1/16" not in out, "16 does not divide 8 rows"
    programs = result["programs"]["tiny"]
    plain, refresh, one = (programs[x] for x in ("plain", "refresh, 1/8", "lax.cond, 1/8"))
    for figure in ("flops", "bytes"):
        assert plain[figure] < min(refresh[figure], one[figure])
    assert all(row["temporary_bytes"] > 1e6 for row in programs.values())
    assert one["flops"] > refresh["flops"], "lax.cond shares no forward pass"
    assert all(row["plain_steps"] > 0 for row in result["times"]["tiny"].values())


def test_a_batch_that_does_not_divide_into_groups_is_rejected(capsys):
    with pytest.raises(SystemExit):
        curvature_cost.main(["--batch", "6"])
    assert "--batch 6 does not divide into 4 groups" in capsys.readouterr().err
