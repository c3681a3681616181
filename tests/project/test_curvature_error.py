"""The benchmark of curvature's error: its statistics, and the laws that its table shows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import curvature_error
from benchmarks.moments import moments, relative_squared_error
from models import DecoderConfig, split
from train.config.presets import preset

SMALL = dataclasses.replace(
    preset(),
    model=DecoderConfig(vocab_size=256, context=8, width=32, layers=1, heads=2),
    steps=40,
    warmup_steps=4,
    sequence_length=8,
)


def test_moments_equal_their_definitions_over_all_pairs():
    draws = np.random.default_rng(0).normal(1, 2, (5, 3))
    found = moments(iter(draws))
    np.testing.assert_allclose(found.mean, draws.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.squared_standard_error, draws.var(0, ddof=1) / 5, rtol=1e-12)
    products = [draws[i] * draws[j] for i in range(5) for j in range(5) if i != j]
    np.testing.assert_allclose(found.squared_mean, np.mean(products, 0), rtol=1e-10)


def test_the_noise_of_the_reference_is_subtracted():
    rng = np.random.default_rng(0)
    truth = np.linspace(1, 2, 4000)
    reference = moments(truth + rng.normal(0, 3, (10, truth.size)))
    noise = reference.squared_standard_error.sum() / (truth**2).sum()
    assert noise == pytest.approx(0.9 / (truth**2).mean(), rel=0.05)
    found = relative_squared_error(truth + rng.normal(0, 0.5, (50, truth.size)), reference)
    exact = 0.25 / (truth**2).mean()
    assert noise > 3 * exact
    # The cross term of the two noises remains.
    assert found["total_error"] == pytest.approx(exact, abs=0.05 * noise)


def test_hutchinson_needs_no_reference_for_its_total_error():
    """On ½ xᵀAx the variance of coordinate i is Σ_{j≠i} A_ij² / groups."""
    P = 400
    A = np.random.default_rng(1).normal(0, 0.2, (P, P))
    A = (A + A.T) / 2 + np.diag(np.linspace(1, 2, P))

    def loss_fn(theta, rows):
        return jnp.mean(rows) * theta @ jnp.asarray(A, jnp.float32) @ theta / 2

    rows = jnp.ones((40, 1))
    p = curvature_error.Problem(jnp.ones(P), lambda theta, rows: rows, loss_fn, rows)
    found = curvature_error.hutchinson_rows(p, number=400, coordinates=20, probes=40)
    squares, diagonal = A**2, np.diag(A)
    variance = squares.sum(1) - diagonal**2
    # The mean product has a relative error of 2 sqrt(2 error / draws / P), which is 1.3% here.
    for row in found:
        groups = row["groups"] or row["rows"]
        total, median = variance.sum() / (diagonal**2).sum(), np.median(variance / diagonal**2)
        assert groups * row["total_error"] == pytest.approx(total, rel=0.05)
        assert groups * row["median_error"] == pytest.approx(median, rel=0.2)
        assert row["reference_error"] < 0.01
    cut = [(row["rows"], row["groups"]) for row in found]
    assert cut == [(40, None), (40, 1), (4, 1), (4, 4), (4, None)]


def test_rows_are_shuffled_between_draws():
    """Otherwise a sub-batch always has the same rows, and the error lacks their noise."""
    rows = jnp.arange(8.0)[:, None]
    p = curvature_error.Problem(jnp.ones(1), lambda *_: rows, lambda *_: rows, rows)
    seen = curvature_error.draws(p, lambda *_, inputs, **unused: inputs[::4, 0], 200)
    pairs = np.stack(list(seen))
    assert (pairs[:, 0] != pairs[:, 1]).all()
    np.testing.assert_allclose(pairs.mean(0), 3.5, atol=4 * (5.25 / 200) ** 0.5)


@pytest.fixture(scope="module")
def cells():
    """Errors, reference and exact diagonal: logits linear in 128 parameters, 32 rows, 8 outputs."""
    x = np.random.default_rng(2).normal(size=(32, 8, 32)).astype(np.float32)
    theta = jax.random.normal(jax.random.key(0), (32, 4)) / 8

    def logits_fn(theta, rows):
        return rows @ theta.reshape(32, 4)

    p = curvature_error.Problem(theta.ravel(), logits_fn, logits_fn, jnp.asarray(x))
    reference = moments(curvature_error.draws(p, one_group_per_row(p), 400))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curvature_error, "FRACTIONS", (1, 4))
        patch.setattr(curvature_error, "GROUPS", (1, 4, 16, None))
        rows = curvature_error.gauss_newton_rows(p, reference, 150)
    probability = np.asarray(jax.nn.softmax(logits_fn(theta, x)))
    exact = np.einsum("btd,btv->dv", x**2, probability * (1 - probability)) / 256
    return {(row["fraction"], row["groups"]): row for row in rows}, reference, exact.ravel()


def one_group_per_row(p):
    return curvature_error.of_groups(p, 1, None)


def test_the_reference_is_the_gauss_newton_diagonal_within_its_standard_error(cells):
    _, reference, exact = cells
    # The mean of 128 squared normal numbers, each with variance 2.
    in_errors = (reference.mean - exact) ** 2 / reference.squared_standard_error
    assert in_errors.mean() == pytest.approx(1, abs=4 * (2 / 128) ** 0.5)
    assert reference.squared_standard_error.sum() < 1e-3 * (exact**2).sum()


def test_an_error_is_two_over_the_groups_plus_a_constant(cells):
    """Var Σ_m s_m² is 2 h² / G for Gaussian s_m; the kurtosis adds a term without G."""
    cells, _, _ = cells
    assert set(cells) == {*((n, g) for n in (1, 4) for g in (1, 4, None))} | {(1, 16)}
    apart = cells[1, None]
    for groups in (1, 4, 16):
        row = cells[1, groups]
        error = 3 * (row["standard_error"] ** 2 + apart["standard_error"] ** 2) ** 0.5
        difference = row["total_error"] - apart["total_error"]
        assert difference == pytest.approx(2 / groups - 2 / 32, abs=error)
        assert error < 0.2 * (2 / groups)
        assert row["median_error"] == pytest.approx(row["total_error"], rel=0.2)


def test_an_error_is_inversely_proportional_to_the_rows(cells):
    cells, _, _ = cells
    ratio = cells[4, None]["total_error"] / cells[1, None]["total_error"]
    assert ratio == pytest.approx(4, rel=0.2)


@pytest.mark.slow
def test_the_table_has_overheads_by_rows_and_marks_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curvature_error, "preset", lambda: SMALL)
    monkeypatch.setattr(curvature_error.program, "use_compile_cache", lambda folder: None)
    monkeypatch.setattr(curvature_error, "FRACTIONS", (10,))
    monkeypatch.setattr(curvature_error, "GROUPS", (1, None))
    monkeypatch.setattr(curvature_error, "HUTCHINSON", ((10, 1),))
    path = tmp_path / "figures.json"
    sizes = {"steps": 12, "rows": 20, "reference": 4, "draws": 3, "coordinates": 8, "probes": 4}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    curvature_error.main([*flags, f"--json={path}"])
    found = json.loads(path.read_text())
    names = {"gauss_newton_bartlett": "shared", "hutchinson": "hutchinson"}
    for method, cost in names.items():
        for row in found[method]:
            assert row["rows"] == 20 // row["fraction"]
            assert row["overhead"] == pytest.approx(found["costs"][cost] / row["fraction"] / 10)
    (marked,) = [line for line in capsys.readouterr().out.splitlines() if "** │" in line]
    assert marked.split()[1:4] == ["2", "=", "1/10"]


def test_a_sample_costs_a_backward_pass_a_gradient_or_a_hessian_vector_product():
    model = split(preset().model)
    rows = jnp.zeros((16, 65), int)
    p = curvature_error.flat_problem(model.apply, model.init(jax.random.key(0)), rows)
    costs = curvature_error.costs(p)
    assert costs["shared"] == pytest.approx(2 / 3, rel=0.05)
    assert costs["apart"] == pytest.approx(1, rel=0.05)
    assert 2 < costs["hutchinson"] < 3
