"""Loss, gradient and a sample of curvature from one forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact import ExactTanh, central_difference
from jax.extend.core import jaxprs_in_params
from moments import flops, jit
from tanh_model import (
    KEY,
    PARAMS,
    ROWS,
    TOKENS,
    K,
    W,
    X,
    Y,
    arguments,
    close,
    logits_fn,
    loss_fn,
    obj_fn,
    shared,
    tanh_squared,
    weights_of,
)

from sophia_optax import gauss_newton_bartlett, hessian_estimate, hutchinson
from sophia_optax.estimators.value_and_grad import value_grad_and_hessian

GNB = {
    "one group": {},
    "groups": {"groups": 4},
    "groups side by side": {"groups": 4, "parallel_groups": 2},
    "draws": {"num_samples": 3},
    "draws in groups": {"num_samples": 3, "groups": 2},
    "half": {"batch_fraction": 0.5},
    "a quarter in groups": {"batch_fraction": 0.25, "groups": 2},
}
HUTCHINSON = {
    f"{mode}, {number} probes": {"mode": mode, "num_samples": number, "probe": probe}
    for mode, number, probe in (
        ("forward", 1, "rademacher"),
        ("reverse", 1, "normal"),
        ("forward", 3, "normal"),
        ("reverse", 3, "rademacher"),
    )
}
HALVES = {
    "half, forward, 1 probes": {"batch_fraction": 0.5},
    "half, reverse, 3 probes": {"batch_fraction": 0.5, "mode": "reverse", "num_samples": 3},
}
ESTIMATORS = {name: gauss_newton_bartlett(**settings) for name, settings in GNB.items()} | {
    name: hutchinson(**settings) for name, settings in (HUTCHINSON | HALVES).items()
}


# ---------------------------------------------------------------- what it returns


@pytest.mark.parametrize(
    ("name", "weighted"),
    [*((name, True) for name in ESTIMATORS), ("one group", False), ("groups", False)],
)
def test_loss_and_gradient_are_exact_and_the_sample_is_the_estimators(name, weighted):
    with jax.enable_x64(True):
        params, extra = arguments(weighted=weighted)
        loss, gradient, h = shared(ESTIMATORS[name], params, extra)
        exact = ExactTanh("categorical", X, W if weighted else None)
        close(loss, exact.loss(PARAMS, Y["categorical"]))
        close(gradient, exact.gradient(PARAMS, Y["categorical"]))
        sample = jit(lambda key, params: ESTIMATORS[name](key, params, None, **extra))
        close(h, sample(KEY, params))


@pytest.mark.parametrize("settings", [{}, {"groups": 4}, {"groups": 2, "batch_fraction": 0.25}])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_other_likelihoods_are_exact_too(likelihood, settings):
    gnb = gauss_newton_bartlett(likelihood=likelihood, **settings)
    with jax.enable_x64(True):
        params, extra = arguments(likelihood, weighted=True)
        loss, gradient, h = shared(gnb, params, extra)
        exact = ExactTanh(likelihood, X, weights_of(likelihood))
        close(loss, exact.loss(PARAMS, Y[likelihood]))
        close(gradient, exact.gradient(PARAMS, Y[likelihood]))
        close(h, jit(lambda key, params: gnb(key, params, None, **extra))(KEY, params))


@pytest.mark.parametrize("name", HUTCHINSON)
def test_the_hutchinson_sample_is_the_mean_of_u_times_H_u(name):
    """With the exact Hessian; one linearisation serves all probes."""
    flat = lambda tree: np.concatenate([np.ravel(tree[n]) for n in PARAMS])  # noqa: E731
    model = ExactTanh("categorical", X)
    H = central_difference(lambda p: flat(model.gradient(p, Y["categorical"])), PARAMS)
    settings = HUTCHINSON[name]
    with jax.enable_x64(True):
        params, extra = arguments()
        number = settings["num_samples"]
        keys = jax.random.split(KEY, number) if number > 1 else [KEY]
        sampler = getattr(jax.random, settings["probe"])
        probes = [flat(optax.tree.random_like(key, params, sampler)) for key in keys]
        h = flat(shared(ESTIMATORS[name], params, extra)[2])
    np.testing.assert_allclose(h, np.mean([u * (H @ u) for u in probes], 0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("groups", [1, 2])
def test_draws_are_the_mean_of_samples_of_their_keys(groups):
    """Though one forward pass serves them all."""
    three, one = (gauss_newton_bartlett(groups=groups, num_samples=n) for n in (3, 1))
    with jax.enable_x64(True):
        params, extra = arguments(weighted=True)
        samples = [shared(one, params, extra, key)[2] for key in jax.random.split(KEY, 3)]
        mean = jax.tree.map(lambda *h: np.mean(h, 0), *samples)
        close(shared(three, params, extra)[2], mean)


def test_the_sample_takes_the_place_of_the_estimators_call():
    """With the documented key of update n, fold_in(key(seed), n)."""
    estimate = gauss_newton_bartlett(groups=2)
    params, extra = arguments(dtype="float32")
    tx = hessian_estimate(estimate, update_interval=2, seed=7)

    @jit
    def step(n, inside, outside):
        key = jax.random.fold_in(jax.random.key(7), n)
        _, grads, h = value_grad_and_hessian(estimate)(key, params, **extra)
        _, inside = tx.update(grads, inside, params, **extra)
        return inside, tx.update(grads, outside, params, hessian=h, refresh=n % 2 == 0)[1]

    inside = outside = tx.init(params)
    for n in range(5):
        inside, outside = step(n, inside, outside)
    close(outside, inside, rtol=1e-5, atol=1e-8)
    assert inside.accepted == 3


def test_inputs_may_be_closed_over():
    with jax.enable_x64(True):
        params, extra = arguments()
        closed = {
            "obj_fn": lambda params: obj_fn(params, extra["inputs"]),
            "logits_fn": lambda params: logits_fn(params, extra["inputs"]),
            "loss_fn": lambda outputs: loss_fn(outputs, extra["inputs"]),
        }
        for estimate in (hutchinson(), gauss_newton_bartlett()):
            close(shared(estimate, params, closed), shared(estimate, params, extra))


# ---------------------------------------------------------------- auxiliary output


def test_auxiliary_output_of_the_objective():
    with jax.enable_x64(True):
        params, extra = arguments()
        with_aux = extra | {"obj_fn": lambda p, batch: (obj_fn(p, batch), {"norm": p["w1"] ** 2})}
        half = hutchinson(batch_fraction=0.5)
        for estimate in (hutchinson(), hutchinson(mode="reverse", num_samples=2), half):
            loss, gradient, h = shared(estimate, params, extra)
            aux = {"norm": params["w1"] ** 2}
            have = shared(estimate, params, with_aux, has_aux=True)
            close(have, ((loss, aux), gradient, h))


@pytest.mark.parametrize(
    "name", ["one group", "groups", "groups side by side", "half", "a quarter in groups"]
)
def test_auxiliary_output_of_the_loss_comes_in_the_order_of_the_rows(name):
    def with_aux(outputs, batch):
        return loss_fn(outputs, batch), {"x": batch["x"], "hit": outputs.argmax(-1) == batch["y"]}

    with jax.enable_x64(True):
        params, extra = arguments(weighted=True)
        loss, gradient, h = shared(ESTIMATORS[name], params, extra)
        hit = ExactTanh("categorical", X).outputs(PARAMS).argmax(-1) == Y["categorical"]
        have = shared(ESTIMATORS[name], params, extra | {"loss_fn": with_aux}, has_aux=True)
        close(have, ((loss, {"x": X, "hit": hit}), gradient, h))


def test_auxiliary_output_comes_before_the_state():
    x = jnp.arange(12.0).reshape(4, 3) / 12
    sample = value_grad_and_hessian(gauss_newton_bartlett(), has_aux=True, has_state=True)
    told = {
        "logits_fn": lambda params, x: (x @ params, {"mean": x.mean(0)}),
        "loss_fn": lambda logits, x: (logits.sum(-1) ** 2, {"first": x[:, 0]}),
    }
    run = jax.jit(lambda params: sample(KEY, params, inputs=x, **told)[0])
    _, aux, state = run(jnp.ones((3, 2)))
    np.testing.assert_allclose(aux["first"], x[:, 0])
    np.testing.assert_allclose(state["mean"], x.mean(0), rtol=1e-6)


# ---------------------------------------------------------------- what it costs


def rows_run(function, *args, primitive="erf"):
    """Number of rows on which a primitive runs, with scans unrolled."""

    def count(jaxpr):
        number = 0
        for eqn in jaxpr.eqns:
            inner = sum(count(j) for j in jaxprs_in_params(eqn.params))
            own = eqn.outvars[0].aval.size if eqn.primitive.name == primitive else 0
            number += own + inner * eqn.params.get("length", 1)
        return number

    return count(jax.make_jaxpr(function)(*args).jaxpr) / (TOKENS * K)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in HALVES])
def test_every_row_is_run_forward_once(name):
    """The derivative of erf contains no erf, so this counts forward passes over rows."""

    def erf_logits(params, batch):
        return jax.lax.erf(batch["x"] @ params["w1"]) @ params["w2"]

    def objective(params, batch):
        return jnp.mean(loss_fn(erf_logits(params, batch), batch))

    params, extra = arguments(dtype="float32")
    extra |= {"logits_fn": erf_logits, "obj_fn": objective}
    estimate, settings = ESTIMATORS[name], GNB.get(name, {})

    def apart(params):
        _, grads = jax.value_and_grad(objective)(params, extra["inputs"])
        return grads, estimate(KEY, params, grads, **extra)

    def together(params):
        return value_grad_and_hessian(estimate)(KEY, params, **extra)

    share = settings.get("batch_fraction", 1)
    assert rows_run(together, params) == ROWS
    assert rows_run(apart, params) == ROWS + ROWS * share


def test_groups_cost_one_forward_pass_and_two_backward():
    """By XLA's count; XLA does not merge the forward passes of separate calls."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    sizes = {"w1": (64, 512), "b1": (512,), "w2": (512, 64), "b2": (64,)}
    params = {name: shape(size) for name, size in sizes.items()}
    batch = {"x": shape((256, 64)), "y": jax.ShapeDtypeStruct((256,), jnp.int32)}
    gnb = gauss_newton_bartlett(groups=16, parallel_groups=16)  # the body of a scan is counted once
    extra = {"logits_fn": logits_fn, "loss_fn": loss_fn}

    def apart(params, batch):
        loss, grads = jax.value_and_grad(obj_fn)(params, batch)
        return loss, grads, gnb(KEY, params, None, inputs=batch, **extra)

    def together(params, batch):
        return value_grad_and_hessian(gnb)(KEY, params, inputs=batch, **extra)

    plain = flops(jax.value_and_grad(obj_fn), params, batch)
    apart, together = (flops(f, params, batch) / plain for f in (apart, together))
    print(f"apart {apart:.2f}, together {together:.2f} gradients")
    assert together < 1.7 < 1.8 < apart


# ---------------------------------------------------------------- modes and dtypes


@pytest.mark.parametrize("number", [1, 2])
def test_reverse_mode_takes_a_nested_custom_vjp(number):
    params = jnp.array([0.3, -0.7])
    estimate = hutchinson(mode="reverse", num_samples=number)

    def of(function):
        return shared(estimate, params, {"obj_fn": lambda p: jnp.sum(function(p)) ** 2})

    close(of(tanh_squared), of(lambda x: jnp.tanh(x) ** 2), rtol=1e-5)


def test_the_gradient_has_the_dtypes_of_params_and_the_sample_float32():
    params, extra = arguments(dtype="float32")
    narrow = params | {"w2": params["w2"].astype("bfloat16"), "b1": params["b1"].astype("float16")}
    for name in ("groups", "forward, 1 probes"):
        want = shared(ESTIMATORS[name], params, extra)
        loss, gradient, h = shared(ESTIMATORS[name], narrow, extra)
        assert {n: g.dtype for n, g in gradient.items()} == {n: p.dtype for n, p in narrow.items()}
        assert {leaf.dtype for leaf in jax.tree.leaves((loss, h))} == {np.dtype("float32")}
        for n, g in gradient.items():
            np.testing.assert_allclose(np.asarray(g, float), want[1][n], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("groups", [1, 2])
def test_float16_gradients_do_not_overflow_as_their_sum_would(groups):
    x = jnp.full((1024, 1), 100, "float16")
    estimate = gauss_newton_bartlett(likelihood="gaussian", groups=groups)
    extra = {
        "logits_fn": lambda p, x: x * p,
        "loss_fn": lambda f, x: jnp.sum(f, -1),
        "inputs": x,
    }
    _, gradient, _ = shared(estimate, jnp.ones(1, "float16"), extra)
    assert gradient == 100


@pytest.mark.parametrize("name", ["draws in groups", "forward, 3 probes", "reverse, 1 probes"])
def test_strict_promotion(name):
    params, extra = arguments(dtype="float32", weighted=True)
    extra |= {"weights": jnp.asarray(W, "bfloat16")}
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda: value_grad_and_hessian(ESTIMATORS[name])(KEY, params, **extra))
