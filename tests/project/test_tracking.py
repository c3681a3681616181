"""The benchmark of averages of curvature: their weights, their noise, and the runs compared."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks import rate_search, tracking
from benchmarks.moments import Moments
from models import DecoderConfig
from train.config.presets import preset

SMALL = dataclasses.replace(
    preset(),
    model=DecoderConfig(vocab_size=256, context=8, width=32, layers=1, heads=2),
    steps=40,
    warmup_steps=4,
    sequence_length=8,
)


@pytest.mark.parametrize("b2", [0.0, 0.5, 0.99])
def test_an_average_weights_its_samples_by_age(b2):
    samples = np.random.default_rng(0).normal(1, 1, (7, 5))
    average = tracking.Average((b2, 0.3))
    for h in samples:
        average.add(h)
    weights = (1 - b2) * b2 ** np.arange(7)[::-1] / (1 - b2**7)
    exact = Moments(10, np.ones(5), np.full(5, 0.1))
    squares = (weights @ samples - 1) ** 2
    expected = (squares.sum() - 0.05) / (5 - 0.05)
    assert average.errors(exact)[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_with_fixed_parameters_an_average_has_only_the_noise_of_its_weights():
    """There is no lag: errors follow the squared weights of the four samples at steps 0 to 30."""
    samples, b2s = ((16, 1), (16, 16), (48, 48)), (0.0, 0.5, 0.9)
    still = dataclasses.replace(SMALL, optim=dataclasses.replace(SMALL.optim, learning_rate=1e-9))
    found = tracking.track(still, samples=samples, b2s=b2s, checked=(35,), reference=(64, 6))
    one, sixteen, more = (np.mean(found["errors"][str(kind)], 0) for kind in samples)
    assert one[0] > 1.5 * sixteen[0] > 1.5 * 1.5 * more[0]
    for errors in (one, sixteen, more):
        for b2, error in zip(b2s, errors, strict=True):
            weights = b2 ** np.arange(4) / np.sum(b2 ** np.arange(4))
            assert error / errors[0] == pytest.approx(np.sum(weights**2), rel=0.35)
    assert max(found["reference_error"]) < more[0] / 4


def test_compared_runs_differ_only_in_the_average(tmp_path, monkeypatch):
    trained, cache = [], jax.config.jax_compilation_cache_dir

    def measure(run, after_step=None):
        trained.append(run)
        return {"heldout_loss": run.optim.b2 + run.seed}

    monkeypatch.setattr(rate_search, "measure", measure)
    rows = tracking.losses(
        tmp_path / "runs.json",
        Console(quiet=True),
        b2s=(0.5, 0.9),
        groups=(1, 16),
        rates=(1e-3,),
        seeds=2,
        steps=20,
    )
    assert [row["losses"] for row in rows] == [[0.5, 1.5]] * 2 + [[0.9, 1.9]] * 2
    assert [(run.optim.b2, run.optim.groups, run.seed) for run in trained] == [
        (b2, groups, seed) for b2 in (0.5, 0.9) for groups in (1, 16) for seed in (0, 1)
    ]
    like = dataclasses.replace(trained[0].optim, b2=0.9, groups=16)
    assert dataclasses.replace(trained[0], optim=like, seed=1).hash == trained[-1].hash
    assert jax.config.jax_compilation_cache_dir == cache
