"""Estimators and exact models are right: enumeration, finite differences and closed forms."""

import itertools

import numpy as np
import oracles as o
import pytest
from exact import (
    TOY_LOCAL_MINIMUM,
    TOY_MINIMUM,
    TOY_SADDLE,
    ExactLinear,
    ExactTanh,
    central_difference,
    output_losses,
    sigmoid,
    softmax,
    toy_gradient,
    toy_hessian,
    toy_loss,
)
from trees import flat, random_tree

close = np.testing.assert_allclose
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


# ---------------------------------------------------------------- estimators


def test_rademacher_hutchinson_is_exact_in_mean_with_the_off_diagonal_variance():
    A = np.random.default_rng(8).normal(size=(5, 5))
    H = A + A.T
    probes = np.array(list(itertools.product((-1.0, 1.0), repeat=5)))
    samples = np.stack([o.hutchinson({"x": u}, {"x": H @ u})["x"] for u in probes])
    close(samples.mean(0), np.diag(H))
    close(samples.var(0), (H**2).sum(1) - np.diag(H) ** 2)


def test_normal_hutchinson_adds_twice_the_squared_diagonal_to_the_variance():
    # Three Gauss-Hermite nodes match a normal's moments up to the fifth.
    A = np.random.default_rng(9).normal(size=(4, 4))
    H = A + A.T
    nodes = list(itertools.product(((0, 2 / 3), (3**0.5, 1 / 6), (-(3**0.5), 1 / 6)), repeat=4))
    probability = np.array([np.prod([p for _, p in node]) for node in nodes])
    probes = np.array([[u for u, _ in node] for node in nodes])
    samples = np.stack([o.hutchinson({"x": u}, {"x": H @ u})["x"] for u in probes])
    mean = probability @ samples
    close(mean, np.diag(H), atol=1e-12)
    close(probability @ (samples - mean) ** 2, (H**2).sum(1) + np.diag(H) ** 2)


def test_simple_estimators_by_hand():
    g = {"a": np.array([3.0]), "b": np.array([-4.0])}
    close(flat(o.squared_gradient(g)), [9, 16])
    close(flat(o.squared_gradient(g, 2)), [18, 32])
    close(flat(o.gauss_newton_bartlett(g, 2)), [18, 32])
    close(flat(o.gradient_magnitude(g)), [3, 4])
    close(flat(o.weighted_squared_gradient(g)), [1.5, 16 / 6])
    close(flat(o.grouped_gnb([g, g, o.tree(np.zeros_like, g)], 6)), [3, 16 / 3])


def enumerated(weights, estimate):
    """E over all label combinations of estimate([(W, labels, weights, X) by sequence])."""
    rng = np.random.default_rng(10)
    X, params = rng.normal(size=(3, 2, 2)), {"W": rng.normal(size=(2, 3))}
    model = ExactLinear("categorical", X, weights)
    p = softmax(model.outputs(params)).reshape(-1, 3)
    expectation = 0.0
    for labels in itertools.product(range(3), repeat=6):
        probability = np.prod(p[range(6), labels])
        expectation += probability * estimate(params, X, np.reshape(labels, (3, 2)))["W"]
    return expectation, model.gauss_newton_diagonal(params)["W"]


GROUPS = ((0,), (1, 2), ())
BINARY = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
FRACTIONAL = np.array([[0.3, 0.0], [1.0, 0.5], [0.2, 2.0]])


def group_sums(weights, params, X, labels, power):
    rows = [np.array(group, int) for group in GROUPS]
    models = [ExactLinear("categorical", X[r], weights[r]) for r in rows]
    return [m.summed_sample(params, labels[r], power) for m, r in zip(models, rows, strict=True)]


@pytest.mark.parametrize("weights", [BINARY, FRACTIONAL])
def test_grouped_gnb_mean_is_exact_gauss_newton_diagonal(weights):
    mean, exact = enumerated(
        weights,
        lambda params, X, labels: o.grouped_gnb(
            group_sums(weights, params, X, labels, 0.5), weights.sum()
        ),
    )
    close(mean, exact, rtol=1e-12)


def test_paper_gnb_mean_is_exact_gauss_newton_diagonal_with_padding():
    def estimate(params, X, labels):
        mean_gradient = ExactLinear("categorical", X, BINARY).gradient(params, labels)
        return o.gauss_newton_bartlett(mean_gradient, BINARY.sum())

    mean, exact = enumerated(BINARY, estimate)
    close(mean, exact, rtol=1e-12)


def test_averaging_group_estimates_is_biased_for_unequal_counts():
    counts = [BINARY[list(group)].sum() for group in GROUPS[:2]]

    def estimate(params, X, labels):
        sums = group_sums(BINARY, params, X, labels, 0.5)[:2]
        single = [
            o.gauss_newton_bartlett(o.tree(lambda s, B=B: s / B, s), B)
            for s, B in zip(sums, counts, strict=True)
        ]
        return o.tree(lambda a, b: (a + b) / 2, *single)

    mean, exact = enumerated(BINARY, estimate)
    assert np.abs(mean / exact - 1).max() > 0.1


def test_cotangents_times_w_are_biased_for_fractional_weights():
    mean, exact = enumerated(
        FRACTIONAL,
        lambda params, X, labels: o.grouped_gnb(
            group_sums(FRACTIONAL, params, X, labels, 1.0), FRACTIONAL.sum()
        ),
    )
    assert np.abs(mean / exact - 1).max() > 0.1


# ---------------------------------------------------------------- exact models


def make(kind, likelihood, weighted=True):
    """A small model, its parameters and labels; weights include a zero and fractions."""
    rng = np.random.default_rng(11)
    X, V = rng.normal(size=(3, 2, 4)), 3
    counted = (3, 2, V) if likelihood == "bernoulli" else (3, 2)
    weights = rng.uniform(0, 2, counted) * (rng.random(counted) > 0.2) if weighted else None
    y = {
        "categorical": rng.integers(V, size=(3, 2)),
        "bernoulli": rng.integers(2, size=(3, 2, V)),
        "gaussian": rng.normal(size=(3, 2, V)),
    }[likelihood]
    if kind == "linear":
        return ExactLinear(likelihood, X, weights), random_tree(12, {"W": (4, V)}), y
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, V), "b2": (V,)}
    return ExactTanh(likelihood, X, weights), random_tree(13, shapes), y


def probabilities(likelihood, f):
    """[(p(y|f) in the shape of what B counts, y)] over every value y of one discrete output."""
    if likelihood == "categorical":
        odds = np.exp(f) / np.exp(f).sum(-1, keepdims=True)
        return [(odds[..., v], np.full(f.shape[:-1], v)) for v in range(f.shape[-1])]
    odds = 1 / (1 + np.exp(-f))
    return [(odds, np.ones_like(f)), (1 - odds, np.zeros_like(f))]


@pytest.mark.parametrize("likelihood", LIKELIHOODS[:2])
def test_discrete_losses_are_minus_log_probability(likelihood):
    f = np.random.default_rng(14).normal(size=(3, 2, 4))
    for p, y in probabilities(likelihood, f):
        close(output_losses(likelihood, f, y), -np.log(p))


def test_losses_stay_finite_at_large_outputs():
    f = np.array([[1e4, -1e4]])
    close(output_losses("categorical", f, np.array([1])), 2e4)
    close(output_losses("bernoulli", f, np.array([[0, 1]])), 1e4)
    close(sigmoid(f), [[1, 0]])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["linear", "tanh"])
def test_gradient_matches_central_differences_of_the_loss(kind, likelihood):
    model, params, y = make(kind, likelihood)
    numeric = central_difference(lambda p: model.loss(p, y), params)
    close(flat(model.gradient(params, y)), numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_linear_hessian_matches_central_differences_of_the_gradient(likelihood):
    model, params, y = make("linear", likelihood)
    numeric = central_difference(lambda p: flat(model.gradient(p, y)), params)
    close(model.hessian(params), numeric, rtol=1e-6, atol=1e-9)
    close(flat(model.hessian_diagonal(params)), np.diag(numeric), rtol=1e-6, atol=1e-9)


def test_tanh_jacobian_matches_central_differences_of_the_outputs():
    model, params, _ = make("tanh", "gaussian")
    numeric = central_difference(model.outputs, params)
    jacobian = model.jacobian(params)
    ours = np.concatenate([jacobian[name].reshape(3, 2, 3, -1) for name in params], -1)
    close(np.moveaxis(ours, -1, 0), numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["linear", "tanh"])
def test_gauss_newton_diagonal_is_the_fisher_by_enumeration(kind, likelihood):
    """Σ_n w_n E_y[(∂ℓ_n/∂θ)²] / Σw, ∂ℓ_n by differences; Gaussian: E = Σ_v (∂f_v/∂θ)²."""
    model, params, _ = make(kind, likelihood)
    if likelihood == "gaussian":
        squares = (central_difference(model.outputs, params) ** 2).sum(-1)
    else:
        squares = sum(
            p
            * central_difference(
                lambda q, y=y: output_losses(likelihood, model.outputs(q), y), params
            )
            ** 2
            for p, y in probabilities(likelihood, model.outputs(params))
        )
    axes = tuple(range(1, squares.ndim))
    fisher = (model.weights * squares).sum(axes) / model.weights.sum()
    close(flat(model.gauss_newton_diagonal(params)), fisher, rtol=1e-6, atol=1e-9)


def test_categorical_linear_gauss_newton_diagonal_is_x_squared_p_one_minus_p():
    model, params, _ = make("linear", "categorical")
    p = softmax(model.outputs(params))
    closed = np.einsum("bt,bti,btv->iv", model.weights, model.X**2, p * (1 - p))
    close(model.gauss_newton_diagonal(params)["W"], closed / model.weights.sum())


def test_default_weights_count_every_output_once():
    for likelihood, counted in zip(LIKELIHOODS, (6, 18, 6), strict=True):
        model, params, y = make("linear", likelihood, weighted=False)
        losses = output_losses(likelihood, model.outputs(params), y)
        assert losses.size == counted
        close(model.loss(params, y), losses.mean())


def test_weights_of_the_wrong_shape_are_refused():
    model, params, y = make("linear", "bernoulli")
    model.weights = np.ones((3, 2))
    with pytest.raises(ValueError, match="weights have shape"):
        model.loss(params, y)


# ---------------------------------------------------------------- the 2-D toy


def test_toy_derivatives_match_central_differences():
    for point in np.random.default_rng(15).uniform(-2, 5, size=(8, 2)):
        theta = {"x": point}
        gradient = central_difference(lambda p: toy_loss(p["x"]), theta)
        hessian = central_difference(lambda p: toy_gradient(p["x"]), theta)
        close(toy_gradient(point), gradient, rtol=1e-6, atol=1e-6)
        close(toy_hessian(point), hessian, rtol=1e-6, atol=1e-6)


def test_toy_stationary_points_are_two_minima_and_a_saddle():
    for point in (TOY_MINIMUM, TOY_SADDLE, TOY_LOCAL_MINIMUM):
        close(toy_gradient(point), 0, atol=1e-14)
    close(np.diag(toy_hessian(TOY_MINIMUM)), [68.8, 1])
    close(np.diag(toy_hessian(TOY_SADDLE)), [-27.2, 1])
    assert (np.diag(toy_hessian(TOY_LOCAL_MINIMUM)) > 0).all()
    assert toy_loss(TOY_MINIMUM) == 0 and round(toy_loss(TOY_LOCAL_MINIMUM), 2) == 5.43


def test_toy_is_concave_in_theta1_only_between_the_stated_ends():
    x = np.linspace(-1, 1, 2001)
    concave = x[[toy_hessian((a, 0))[0, 0] < 0 for a in x]]
    close((concave[0], concave[-1]), (-0.3655, 0.5963), atol=1.5e-3)
    assert len(concave) == np.count_nonzero((x >= concave[0]) & (x <= concave[-1]))


def test_from_the_toy_start_newton_finds_the_saddle_and_sophia_the_minimum():
    newton, params = np.array([0.2, 0.0]), {"x": np.array([0.2, 0.0])}
    sophia = o.Sophia(0.2, b1=0.0, b2=0.0, gamma=1.0, update_interval=1)
    for _ in range(100):
        newton = newton - np.linalg.solve(toy_hessian(newton), toy_gradient(newton))
        x = params["x"]
        curvature = {"x": np.diag(toy_hessian(x))}
        params = sophia.step(params, {"x": toy_gradient(x)}, curvature)
    close(newton, TOY_SADDLE, atol=1e-9)
    close(params["x"], TOY_MINIMUM, atol=1e-6)
