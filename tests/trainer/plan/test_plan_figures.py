"""Figures of a plan that no compiled program is needed for."""

import dataclasses

import pytest

from train.config.presets import preset
from train.parallel.mesh import MeshConfig
from train.plan.plan import plan
from train.plan.step_flops import step_flops


def run_of(optimizer="adamw", **changes):
    return dataclasses.replace(preset("tiny", optimizer), batch_size=32, **changes)


def test_rows_are_spread_over_data_and_fsdp():
    figures = plan(run_of(mesh=MeshConfig(data=2, fsdp=2, tensor=2)), devices=8)
    assert figures.row_devices == 4 and figures.devices == 8


def test_micro_batches_keep_the_sum_of_their_gradients():
    one, two = (plan(run_of(accumulation=n), devices=1).steps["every step"].memory for n in (1, 2))
    assert two.gradients - one.gradients == one.parameters


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h"])
def test_a_step_that_samples_has_the_operations_of_its_sample(optimizer):
    figures = plan(run_of(optimizer), devices=8)
    plain, sampled = figures.steps["plain"], figures.steps["curvature"]
    assert figures.curvature_flops > 0
    assert 8 * (sampled.flops - plain.flops) == pytest.approx(figures.curvature_flops)
    assert 8 * plain.flops == pytest.approx(step_flops(figures.config))
