"""Hutchinson's estimator against the exact Hessian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from exact import ExactTanh, central_difference
from moments import assert_mean, draw, flops, jit, standard_error
from tanh_model import tanh_squared

from sophia_optax import (
    hessian_estimate,
    hutchinson,
    value_grad_and_hessian,
)

ROWS, D, K, V = 6, 2, 3, 3
PROBES = ("rademacher", "normal")
MODES = ("forward", "reverse")
rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, D))
Y = rng.integers(V, size=ROWS)
PARAMS = {
    name: 1.5 * rng.normal(size=shape)
    for name, shape in {"w1": (D, K), "b1": (K,), "w2": (K, V), "b2": (V,)}.items()
}
BATCH = {"x": jnp.asarray(X, jnp.float32), "y": jnp.asarray(Y)}
NUMBER = 40_000


def f32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def mean_loss(params, batch):
    logits = jnp.tanh(batch["x"] @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def flat(tree):
    return np.concatenate([np.ravel(tree[name]) for name in PARAMS], dtype=np.float64)


@functools.cache
def exact_hessian(step=1, first=0):
    """[P, P] by central differences of the oracle's gradient, on every `step`-th row."""
    model = ExactTanh("categorical", X[first::step])
    return central_difference(lambda p: flat(model.gradient(p, Y[first::step])), PARAMS)


@functools.cache
def samples(probe, mode, **arguments):
    estimate = hutchinson(probe=probe, mode=mode, **arguments)
    extra = {"obj_fn": mean_loss, "inputs": BATCH}
    return draw(lambda key: estimate(key, f32(PARAMS), None, **extra), NUMBER)


def one_sample(key=0, params=PARAMS, inputs=BATCH, obj_fn=mean_loss, **arguments):
    estimate = hutchinson(**arguments)

    def sample(key, params):
        return estimate(key, params, None, obj_fn=obj_fn, inputs=inputs)

    return jit(sample)(jax.random.key(key), f32(params))


@functools.cache
def whole_batch_sample():
    return one_sample()


# ---------------------------------------------------------------- mean and variance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("probe", PROBES)
def test_mean_is_the_exact_hessian_diagonal(probe, mode):
    H = exact_hessian()
    assert np.diag(H).min() < -0.01  # the network is not convex
    assert_mean(samples(probe, mode), oracles.unflatten(np.diag(H), PARAMS), power=0.1)


@pytest.mark.parametrize("probe", PROBES)
def test_variance_is_the_off_diagonal_and_for_normal_probes_twice_the_diagonal(probe):
    H, h = exact_hessian(), samples(probe, "forward")
    h = np.concatenate([h[name].reshape(NUMBER, -1) for name in PARAMS], -1)
    squares = (h - np.diag(H)) ** 2
    want = (H**2).sum(1) - np.diag(H) ** 2 + (probe == "normal") * 2 * np.diag(H) ** 2
    assert np.all(np.abs(squares.mean(0) - want) < 5 * standard_error(squares))
    assert np.median(5 * standard_error(squares) / want) < 0.1


def test_num_samples_divides_the_variance():
    one, four = samples("rademacher", "forward"), samples("rademacher", "forward", num_samples=4)
    for name in PARAMS:
        np.testing.assert_allclose(4 * four[name].var(0), one[name].var(0), rtol=0.1)


def test_groups_leave_the_mean_and_average_the_variance_of_their_own_hessians():
    """Var h = (1/G²) Σ_g Σ_{j≠i} (H_g)_ij², with sets g, g + G, ... of the rows."""
    h = samples("rademacher", "forward", groups=3)
    assert_mean(h, oracles.unflatten(np.diag(exact_hessian()), PARAMS), power=0.1)
    flattened = np.concatenate([h[name].reshape(NUMBER, -1) for name in PARAMS], -1)
    squares = (flattened - np.diag(exact_hessian())) ** 2
    parts = [exact_hessian(3, first) for first in range(3)]
    want = sum((H**2).sum(1) - np.diag(H) ** 2 for H in parts) / 9
    assert np.all(np.abs(squares.mean(0) - want) < 5 * standard_error(squares))


def test_loss_and_gradient_beside_grouped_samples_are_those_of_the_whole_batch():
    key, params, grouped = jax.random.key(0), f32(PARAMS), hutchinson(groups=3)
    extra = {"obj_fn": mean_loss, "inputs": BATCH}
    loss, grads, h = jit(lambda key, params: value_grad_and_hessian(grouped)(key, params, **extra))(
        key, params
    )
    want, gradient = jax.value_and_grad(mean_loss)(params, BATCH)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for name, sample in one_sample(groups=3).items():
        np.testing.assert_allclose(grads[name], gradient[name], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(h[name], sample, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "inputs", "message"),
    [
        ({"groups": 0}, BATCH, "groups"),
        ({"groups": 4}, BATCH, r"6 rows \(of 6, batch_fraction=1.0\) do not divide into groups=4"),
        ({"groups": 2}, None, r"hutchinson\(groups=2\) cuts rows from `inputs`"),
    ],
)
def test_groups_that_cannot_be_cut_are_refused(arguments, inputs, message):
    with pytest.raises(ValueError, match=message):
        one_sample(inputs=inputs, **arguments)


def test_every_sample_of_a_diagonal_hessian_is_exact():
    x = jnp.array([1.0, -2.0, 0.5])
    for mode in MODES:
        h = one_sample(params=x, inputs=None, obj_fn=lambda x: jnp.sum(x**4), mode=mode)
        np.testing.assert_allclose(h, 12 * x**2, rtol=1e-6)


# ---------------------------------------------------------------- modes and batches


@pytest.mark.parametrize("probe", PROBES)
def test_both_modes_agree_key_by_key(probe):
    forward, reverse = (samples(probe, mode) for mode in MODES)
    for name in PARAMS:  # of order one, with cancellation
        np.testing.assert_allclose(forward[name], reverse[name], rtol=1e-5, atol=1e-5)


def test_reverse_mode_takes_a_nested_custom_vjp_which_forward_mode_does_not():
    params = jnp.array([0.3, -0.7])

    def sample(function, mode):
        return one_sample(
            params=params, inputs=None, obj_fn=lambda p: jnp.sum(function(p)) ** 2, mode=mode
        )

    plain = sample(lambda x: jnp.tanh(x) ** 2, "reverse")
    np.testing.assert_allclose(sample(tanh_squared, "reverse"), plain, rtol=1e-5)
    with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
        sample(tanh_squared, "forward")


def test_sub_batch_is_every_nth_row():
    every_other = one_sample(inputs={name: x[::2] for name, x in BATCH.items()})
    for name, h in one_sample(batch_fraction=0.5).items():
        np.testing.assert_allclose(h, every_other[name], rtol=1e-6)
        assert not np.allclose(h, whole_batch_sample()[name], rtol=1e-2)


def test_inputs_may_be_passed_or_closed_over():
    closed = one_sample(inputs=None, obj_fn=lambda params: mean_loss(params, BATCH))
    for name, h in whole_batch_sample().items():
        np.testing.assert_allclose(h, closed[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_costs_two_to_three_gradients(mode):
    shape = jax.ShapeDtypeStruct
    sizes = {"w1": (64, 128), "b1": (128,), "w2": (128, 256), "b2": (256,)}
    params = {name: shape(size, jnp.float32) for name, size in sizes.items()}
    batch = {"x": shape((256, 64), jnp.float32), "y": shape((256,), jnp.int32)}
    estimate = hutchinson(mode=mode)

    def sample(params, batch):
        return estimate(jax.random.key(0), params, None, obj_fn=mean_loss, inputs=batch)

    ratio = flops(sample, params, batch) / flops(jax.grad(mean_loss), params, batch)
    print(f"{mode}: {ratio:.2f} gradients")
    assert 2 < ratio < 3


# ---------------------------------------------------------------- with optax.contrib.sophia


def run_optax_sophia(steps, **arguments):
    """The `nu` of every step."""
    tx = optax.contrib.sophia(0.05, update_interval=2, **arguments)
    objective = functools.partial(mean_loss, batch=BATCH)

    @jit
    def step(params, state):
        updates, state = tx.update(jax.grad(objective)(params), state, params, obj_fn=objective)
        return optax.apply_updates(params, updates), state

    params, history = f32(PARAMS), []
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
        history.append(state[0].nu)
    return history


def test_estimate_serves_as_hessian_diagonal_fn_of_optax_sophia(monkeypatch):
    """`nu` equals that of optax's own estimator, with probes that depend on the parameters."""

    def probes(key, tree, *unused, **also_unused):
        return jax.tree.map(lambda x: jnp.sign(jnp.sin(1e3 * x)), tree)

    monkeypatch.setattr(optax.tree, "random_like", probes)
    ours = hessian_estimate(hutchinson(), decay=0, update_interval=1, bias_correction=False)
    want, have = run_optax_sophia(5), run_optax_sophia(5, hessian_diagonal_fn=ours)
    assert not np.allclose(want[0]["w1"], want[4]["w1"], rtol=0.1)
    for a, b in zip(want, have, strict=True):
        for name in PARAMS:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-8)
