"""The benchmark of estimators: bias, error and cost of one sample."""

import json

import pytest

from benchmarks import estimator_variance


@pytest.mark.slow
def test_groups_reduce_the_error_at_equal_cost_without_bias(tmp_path, monkeypatch):
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
