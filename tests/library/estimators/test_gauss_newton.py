"""Gauss-Newton-Bartlett against exact Gauss-Newton diagonals and exact sampled gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from exact import ExactLinear, ExactTanh, sigmoid, softmax
from moments import assert_mean, draw, flops, jit
from tanh_model import ROWS, TOKENS, D, K, V, W, X, weights_of

from sophia_optax import gauss_newton_bartlett

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


def tree_of(seed, **shapes):
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape) for name, shape in shapes.items()}


def linear(params, x):
    return x @ params["W"]


def tanh(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


MODELS = {
    "linear": (linear, ExactLinear, tree_of(1, W=(D, V))),
    "tanh": (tanh, ExactTanh, tree_of(2, w1=(D, K), b1=(K,), w2=(K, V), b2=(V,))),
}


def f32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


# (model, arguments, weighted)
CASES = {
    "one group": ("tanh", {}, False),
    "one group, weights": ("tanh", {}, True),
    "four groups, weights": ("tanh", {"groups": 4}, True),
    "four groups, weights, linear": ("linear", {"groups": 4}, True),
    "half of the rows in two groups, two draws, weights": (
        "linear",
        {"batch_fraction": 0.5, "groups": 2, "num_samples": 2},
        True,
    ),
}


# ---------------------------------------------------------------- the mean


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_mean_is_the_exact_gauss_newton_diagonal(likelihood, case):
    model, arguments, weighted = CASES[case]
    logits_fn, exact_model, params = MODELS[model]
    weights = weights_of(likelihood) if weighted else None
    gnb = gauss_newton_bartlett(likelihood=likelihood, **arguments)
    extra = {"logits_fn": logits_fn, "inputs": f32(X), "weights": f32(weights)}
    samples = draw(lambda key: gnb(key, f32(params), None, **extra), 40_000)
    step = round(1 / arguments.get("batch_fraction", 1))
    kept = None if weights is None else weights[::step]
    exact = exact_model(likelihood, X[::step], kept).gauss_newton_diagonal(params)
    assert_mean(samples, exact, power=0.07)


def test_mean_is_exact_through_sampled_loss_fn():
    """The caller draws labels and weighs its own outputs, cotangents times sqrt(w)."""
    _, exact_model, params = MODELS["tanh"]

    def sampled_loss(params, batch, key):
        logits = tanh(params, batch["x"])
        labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
        return -jnp.sum(jnp.sqrt(batch["w"]) * picked), jnp.sum(batch["w"])

    gnb = gauss_newton_bartlett(groups=4)
    batch = f32({"x": X, "w": W})

    def estimate(key):
        return gnb(key, f32(params), None, sampled_loss_fn=sampled_loss, inputs=batch)

    exact = exact_model("categorical", X, W).gauss_newton_diagonal(params)
    assert_mean(draw(estimate, 40_000), exact, power=0.07)


# ---------------------------------------------------------------- the formula, label by label


def row_logits(params, batch):
    """A shared linear model plus a parameter of its own for every output of every row."""
    return batch["x"] @ params["W"] + params["R"][batch["row"]]


ROW_PARAMS = {"W": MODELS["linear"][2]["W"], "R": np.zeros((ROWS, TOKENS, V))}
ROW_BATCH = {"x": X, "row": np.arange(ROWS)}


def row_sample(likelihood, key=0, batch=ROW_BATCH, weights=None, params=ROW_PARAMS, **arguments):
    gnb = gauss_newton_bartlett(likelihood=likelihood, **arguments)
    batch = {"x": f32(batch["x"]), "row": jnp.asarray(batch["row"])}
    extra = {"logits_fn": row_logits, "inputs": batch, "weights": f32(weights)}
    h = jit(lambda key, params: gnb(key, params, None, **extra))(jax.random.key(key), f32(params))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), h)


def labels_in(h_R, f, likelihood):
    """The labels that were drawn: h of an output's own parameter is (p - y)² / B at weight 1."""
    if likelihood == "bernoulli":
        p, h = sigmoid(f), h_R * f.size
        return (np.abs(h - (1 - p) ** 2) < np.abs(h - p**2)).astype(int)
    p, h = softmax(f)[..., None, :], (h_R * f[..., 0].size)[..., None, :]
    return np.abs(h - (p - np.eye(V)) ** 2).sum(-1).argmin(-1)


@functools.cache
def plain_sample(likelihood):
    return row_sample(likelihood)["R"]


def labels_drawn(likelihood):
    return labels_in(plain_sample(likelihood), linear(ROW_PARAMS, X), likelihood)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_sample_is_the_sum_of_squared_group_gradients_over_B(likelihood, weighted, groups):
    """(1/B) Σ s_m², for the very labels drawn, which neither weights nor groups change."""
    labels, params = labels_drawn(likelihood), {"W": ROW_PARAMS["W"]}
    weights = weights_of(likelihood) if weighted else np.ones_like(labels)
    parts = zip(*(np.split(a, groups) for a in (X, labels, weights)), strict=True)
    squares = [ExactLinear(likelihood, x, w).summed_sample(params, y) for x, y, w in parts]
    want = oracles.grouped_gnb(squares, weights.sum())["W"]
    h = row_sample(likelihood, weights=weights if weighted else None, groups=groups)
    np.testing.assert_allclose(h["W"], want, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_sampled_loss_fn_has_each_group_squared_apart(likelihood):
    """With labels fixed by the caller nothing is random, and the sample is exact."""
    _, exact_model, params = MODELS["tanh"]
    f = exact_model(likelihood, X).outputs(params)
    shape = f.shape if likelihood != "categorical" else f.shape[:-1]
    y = np.random.default_rng(3).integers(2, size=shape)
    weights = weights_of(likelihood)

    def losses(f, y):
        if likelihood == "categorical":
            return optax.softmax_cross_entropy_with_integer_labels(f, y)
        if likelihood == "bernoulli":
            return jax.nn.softplus(f) - y * f
        return ((y - f) ** 2).sum(-1) / 2

    def loss(params, batch, key):
        root = jnp.sqrt(batch["w"])
        return jnp.sum(root * losses(tanh(params, batch["x"]), batch["y"])), jnp.sum(batch["w"])

    batch = {"x": f32(X), "y": jnp.asarray(y), "w": f32(weights)}
    gnb = gauss_newton_bartlett(groups=4)
    extra = {"sampled_loss_fn": loss, "inputs": batch}
    h = jit(lambda params: gnb(jax.random.key(0), params, None, **extra))(f32(params))
    parts = zip(*(np.split(a, 4) for a in (X, y, weights)), strict=True)
    squares = [exact_model(likelihood, x, w).summed_sample(params, y) for x, y, w in parts]
    want = oracles.grouped_gnb(squares, weights.sum())
    for name in want:
        np.testing.assert_allclose(h[name], want[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- labels belong to (key, row)


def test_labels_follow_the_row_number_not_what_is_in_the_row():
    """At equal logits, a row moved to another place gets the label of that place."""
    params = {"W": np.zeros((D, V)), "R": np.zeros((ROWS, TOKENS, V))}
    order = np.array([3, 0, 7, 1, 6, 2, 5, 4])
    straight = row_sample("categorical", params=params)["R"]
    moved = row_sample("categorical", params=params, batch={"x": X[order], "row": order})["R"]
    np.testing.assert_array_equal(moved[order], straight)
    assert not np.array_equal(moved, straight)


def test_a_sub_batch_keeps_the_labels_of_its_rows_and_counts_only_them():
    whole, half = plain_sample("categorical"), row_sample("categorical", batch_fraction=0.5)["R"]
    np.testing.assert_allclose(half[::2], 2 * whole[::2], rtol=1e-6)
    assert not half[1::2].any()


def test_labels_change_with_the_key():
    assert not np.array_equal(plain_sample("categorical"), row_sample("categorical", key=1)["R"])


def test_groups_of_sampled_loss_fn_draw_apart():
    def loss(params, rows, key):
        return params[rows[0]] * jax.random.normal(key), 1

    gnb = gauss_newton_bartlett(groups=ROWS)
    extra = {"sampled_loss_fn": loss, "inputs": jnp.arange(ROWS)}
    h = jit(lambda params: gnb(jax.random.key(0), params, None, **extra))(jnp.zeros(ROWS))
    assert len(np.unique(h)) == ROWS


@pytest.mark.parametrize("number", [1, 3])
def test_parallel_groups_change_nothing(number):
    """Four groups in turn, two or three at a time, all at once, and with idle slots."""
    arguments = {"groups": 4, "num_samples": number, "weights": W}
    settings = ({"parallel_groups": n} for n in (1, 2, 3, 4, 16))
    one, *others = (row_sample("categorical", **arguments, **more) for more in settings)
    for other, name in itertools.product(others, one):
        np.testing.assert_allclose(other[name], one[name], rtol=1e-6, atol=1e-9)


def test_rows_of_weight_zero_are_as_if_they_were_not_there():
    """An empty group adds nothing, and padding rows change neither B nor a label."""
    ones = np.ones((4, TOKENS))
    padded = row_sample("categorical", groups=4, weights=np.concatenate([ones, 0 * ones]))
    batch = {name: x[:4] for name, x in ROW_BATCH.items()}
    short = row_sample("categorical", groups=2, weights=ones, batch=batch)
    for name in short:
        np.testing.assert_allclose(padded[name], short[name], rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- what groups and draws are worth


def relative_squared_error(samples, exact):
    """(total, median over coordinates) of E (h - exact)² / exact²."""
    error = np.concatenate([((samples[n] - exact[n]) ** 2).mean(0).ravel() for n in exact])
    square = np.concatenate([exact[n].ravel() ** 2 for n in exact])
    return error.sum() / square.sum(), np.median(error / square)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_sixteen_groups_have_a_fraction_of_the_error_of_one(likelihood):
    """64 independent rows: about 2 at one group, 2/16 at sixteen (printed with -s)."""
    x = np.random.default_rng(5).normal(size=(64, 4))
    params = tree_of(4, w1=(4, 5), b1=(5,), w2=(5, 4), b2=(4,))
    params = {name: leaf / 2 for name, leaf in params.items()}
    exact = ExactTanh(likelihood, x).gauss_newton_diagonal(params)
    errors = {}
    for groups in (1, 16):
        gnb = gauss_newton_bartlett(likelihood=likelihood, groups=groups)
        extra = {"logits_fn": tanh, "inputs": f32(x)}
        samples = draw(lambda key: gnb(key, f32(params), None, **extra), 2000)  # noqa: B023
        errors[groups] = relative_squared_error(samples, exact)
        print(f"{likelihood}, {groups} groups: total %.3f, median %.3f" % errors[groups])
    assert errors[16][0] <= errors[1][0] / 8
    assert errors[16][1] <= errors[1][1] / 8


def test_draws_are_independent():
    """Four draws have a quarter of the variance of one; their mean is tested above."""
    _, _, params = MODELS["tanh"]
    extra = {"logits_fn": tanh, "inputs": f32(X)}
    variances = []
    for number in (1, 4):
        gnb = gauss_newton_bartlett(num_samples=number)
        samples = draw(lambda key: gnb(key, f32(params), None, **extra), 20_000)  # noqa: B023
        variances.append({name: h.var(0) for name, h in samples.items()})
    for name in params:
        np.testing.assert_allclose(4 * variances[1][name], variances[0][name], rtol=0.15)


def test_sixteen_groups_cost_what_one_costs():
    """The groups run in parallel, because XLA counts the body of a scan once."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {
        "w1": shape((64, 128)),
        "b1": shape((128,)),
        "w2": shape((128, 256)),
        "b2": shape((256,)),
    }

    def cost(groups):
        gnb = gauss_newton_bartlett(groups=groups, parallel_groups=groups)

        def sample(params, x):
            return gnb(jax.random.key(0), params, None, logits_fn=tanh, inputs=x)

        return flops(sample, params, shape((256, 64)))

    one, sixteen = cost(1), cost(16)
    print(f"sixteen groups cost {sixteen / one:.3f} times the operations of one")
    assert one > 6 * 256 * (64 * 128 + 128 * 256) * 0.8  # the matrix products are in the count
    assert sixteen < 1.15 * one
