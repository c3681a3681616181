"""The soak benchmark detects real growth, and only real growth."""

import numpy as np
import pytest

from benchmarks import soak


def points(slope, noise, seed=0):
    rng = np.random.default_rng(seed)
    steps = np.arange(200, 20_001, 200)
    memory = 400 + slope * steps / 1000 + noise * rng.normal(size=len(steps))
    return [soak.Point(int(s), float(m), 20, 3.0) for s, m in zip(steps, memory, strict=True)]


@pytest.mark.parametrize(
    ("slope", "noise", "grew"), [(2.0, 1.0, True), (0, 1.0, False), (0.01, 1e-3, False)]
)
def test_growth_is_a_significant_and_large_slope(slope, noise, grew):
    line = soak.fit(points(slope, noise), "memory")
    assert line.grew == grew
    assert line.slope == pytest.approx(slope, abs=4 * line.error)
    assert not soak.fit(points(slope, noise), "files").grew


def test_the_standard_error_is_that_of_least_squares():
    half = points(1.0, 1.0)[50:]
    x, y = np.array([p.step / 1000 for p in half]), np.array([p.memory for p in half])
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    line = soak.fit(points(1.0, 1.0), "memory")
    assert line.slope == pytest.approx(slope)
    assert line.error == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-6)


@pytest.mark.slow
def test_a_short_run_is_measured_printed_and_plotted(tmp_path, capsys):
    soak.main(["--steps", "40", "--every", "4", "--plot", str(tmp_path / "soak.png")])
    shown = capsys.readouterr().out
    for word in ("resident memory", "open files", "time of a step", "40 steps"):
        assert word in shown
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
