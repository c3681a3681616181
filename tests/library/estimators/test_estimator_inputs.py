"""Inputs that estimators accept (dtypes, trees, masks), and errors that name cause and cure."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moments import jit

from sophia_optax import gauss_newton_bartlett, hessian_estimate, hutchinson, squared_gradient

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)), jnp.float32)
PARAMS = {"w": jnp.array([[1.0, -0.5, 0.2], [0.3, 0.7, -1.0]]), "b": jnp.array([0.1, 0.0, -0.2])}


def logits_fn(params, x):
    return jnp.tanh(x) @ params["w"] + params["b"]


def mean_loss(params, x):
    return jnp.mean(jnp.square(jnp.tanh(logits_fn(params, x))))


EXTRA = {"obj_fn": mean_loss, "logits_fn": logits_fn, "inputs": X}
FACTORIES = (hutchinson, gauss_newton_bartlett)


def sample(estimate, params=PARAMS, **extra):
    return jit(lambda params: estimate(KEY, params, params, **extra))(params)


def refuses(match, estimate, params=PARAMS, error=ValueError, **extra):
    with pytest.raises(error, match=match):
        jax.eval_shape(lambda params: estimate(KEY, params, None, **extra), params)


# ---------------------------------------------------------------- arguments of the factories


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_samples": 0}, "num_samples=0 must be an integer of at least 1"),
        ({"num_samples": 1.5}, "num_samples=1.5 must be an integer of at least 1"),
        ({"batch_fraction": 0}, r"batch_fraction=0 is outside \(0, 1\]"),
        ({"batch_fraction": 1.5}, r"batch_fraction=1.5 is outside \(0, 1\]"),
    ],
)
def test_numbers_out_of_range_are_refused(factory, arguments, match):
    with pytest.raises(ValueError, match=match):
        factory(**arguments)


@pytest.mark.parametrize(
    ("factory", "arguments", "match"),
    [
        (hutchinson, {"probe": "uniform"}, "probe='uniform' is unknown.*rademacher, normal"),
        (hutchinson, {"mode": "both"}, "mode='both' is unknown.*forward, reverse"),
        (
            gauss_newton_bartlett,
            {"likelihood": "poisson"},
            "likelihood='poisson' is unknown.*categorical, bernoulli, gaussian",
        ),
        (gauss_newton_bartlett, {"groups": 0}, "groups=0 must be an integer of at least 1"),
        (gauss_newton_bartlett, {"parallel_groups": 0}, "parallel_groups=0 must be an integer"),
        (gauss_newton_bartlett, {"parallel_groups": 4}, "parallel_groups=4 needs several groups"),
        (
            gauss_newton_bartlett,
            {"groups": 8, "spmd_axis_name": "data"},
            "spmd_axis_name='data' spreads groups.*but parallel_groups=1. Set `parallel_groups`",
        ),
    ],
)
def test_unknown_choices_and_bad_groups_are_refused(factory, arguments, match):
    with pytest.raises(ValueError, match=match):
        factory(**arguments)


def test_shards_is_the_deprecated_name_of_parallel_groups():
    with pytest.warns(DeprecationWarning, match="the argument is now `parallel_groups`"):
        assert dtypes(sample(gauss_newton_bartlett(groups=4, shards=2), **EXTRA)) == {"float32"}
    with (
        pytest.warns(DeprecationWarning, match="parallel_groups"),
        pytest.raises(ValueError, match="parallel_groups=4 needs several groups"),
    ):
        gauss_newton_bartlett(shards=4)
    with pytest.raises(TypeError, match="together with shards=2, its deprecated name"):
        gauss_newton_bartlett(groups=4, parallel_groups=2, shards=2)


# ---------------------------------------------------------------- extra arguments


def test_missing_arguments_are_named_with_the_call_that_passes_them():
    refuses("hutchinson needs `obj_fn`.*obj_fn=lambda params", hutchinson())
    refuses("bartlett needs `logits_fn`.*logits_fn=lambda params", gauss_newton_bartlett())
    refuses("hutchinson needs `params`.*state, params", hutchinson(), None, **EXTRA)
    refuses("bartlett needs `params`.*state, params", gauss_newton_bartlett(), None, **EXTRA)


def test_rows_cannot_be_cut_from_inputs_that_were_not_passed():
    closed = {"obj_fn": lambda params: 0.0, "logits_fn": lambda params: X}
    cure = "cuts rows from `inputs`, which was not passed. Pass `inputs=batch`"
    refuses(cure, hutchinson(batch_fraction=0.5), **closed)
    refuses(cure, gauss_newton_bartlett(batch_fraction=0.5), **closed)
    refuses(cure, gauss_newton_bartlett(groups=2), **closed)


def test_an_objective_with_auxiliary_output_is_refused():
    cure = "returns.*Drop the auxiliary output"
    for objective in (lambda p: (jnp.sum(p["w"]), {"acc": 0.0}), lambda p: p["b"]):
        refuses(cure, hutchinson(), error=TypeError, obj_fn=objective)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda p, x: (x @ p["w"], x),
        lambda p, x: (x @ p["w"]).reshape(4, 2, 3),
        lambda p, x: 0.0,
    ],
    ids=["auxiliary", "other rows", "a number"],
)
def test_logits_of_another_form_are_refused(outputs):
    cure = r"must return one array, float\[8, ..., V\].*but it returned.*Drop auxiliary outputs"
    refuses(cure, gauss_newton_bartlett(), logits_fn=outputs, inputs=X)


@pytest.mark.parametrize(
    ("likelihood", "width", "cure"),
    [
        ("categorical", (), r"\(8,\), one logit a row.*likelihood=.bernoulli"),
        ("categorical", (1,), r"\(8, 1\), one logit a row.*likelihood=.bernoulli"),
        ("gaussian", (), r"\(8,\), but 'gaussian' sums over the last axis.*outputs\[:, None\]"),
    ],
)
def test_a_softmax_over_one_class_is_refused_by_name(likelihood, width, cure):
    """Its curvature is 0 everywhere, and every step would be a sign step."""
    estimator = gauss_newton_bartlett(likelihood=likelihood)
    outputs = lambda p, x: jnp.reshape(jnp.sum(x, -1) * p["b"][0], (8, *width))  # noqa: E731
    refuses(cure, estimator, logits_fn=outputs, inputs=X)


def test_one_logit_a_row_is_right_for_bernoulli_and_for_gaussian():
    for likelihood in ("bernoulli", "gaussian"):
        estimator = gauss_newton_bartlett(likelihood=likelihood)
        h = estimator(KEY, PARAMS, None, logits_fn=lambda p, x: x @ p["w"][:, :1], inputs=X)
        assert h["w"][:, 0].all() and not h["w"][:, 1:].any()


def test_rows_that_do_not_divide_into_groups_are_refused():
    gnb = gauss_newton_bartlett(groups=4, batch_fraction=1 / 4)
    refuses(r"2 rows \(of 8.*do not divide into groups=4. Choose a number", gnb, **EXTRA)


@pytest.mark.parametrize("weights", [jnp.ones((8, 3)), jnp.ones((8, 1))])
def test_weights_have_the_shape_of_what_counts(weights):
    match = r"`weights` has shape \(8, \d\), but the outputs that count have shape \(8,\)"
    refuses(match, gauss_newton_bartlett(), weights=weights, **EXTRA)
    bernoulli = gauss_newton_bartlett(likelihood="bernoulli")
    refuses(r"outputs that count have shape \(8, 3\)", bernoulli, weights=jnp.ones(8), **EXTRA)


@pytest.mark.parametrize("inputs", [{"x": X, "y": jnp.ones(7)}, {"x": X, "scale": jnp.ones(())}])
@pytest.mark.parametrize("factory", FACTORIES)
def test_inputs_lead_with_one_batch_axis(factory, inputs):
    extra = {"obj_fn": mean_loss, "logits_fn": logits_fn, "inputs": inputs}
    refuses("must lead with the same batch axis, but the shapes are", factory(), **extra)


def test_weights_lead_with_the_batch_axis_of_inputs():
    match = r"every leaf of `inputs` \(and `weights`\)"
    refuses(match, gauss_newton_bartlett(), weights=jnp.ones(4), **EXTRA)


def test_unknown_extra_arguments_are_ignored():
    for factory in FACTORIES:
        estimate = factory()
        h, again = (sample(estimate, **EXTRA, **more) for more in ({}, {"value": 1.0}))
        jax.tree.map(np.testing.assert_array_equal, h, again)


def test_a_sample_of_nothing_is_rejected_and_counted():
    tx = hessian_estimate(gauss_newton_bartlett(groups=2))

    @jit
    def step(state, weights):
        return tx.update(PARAMS, state, PARAMS, **EXTRA, weights=weights, refresh=True)

    h, good = step(tx.init(PARAMS), jnp.ones(8))
    same, state = step(good, jnp.zeros(8))
    assert (good.rejected, state.rejected, state.accepted) == (0, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, (h, good.h), (same, state.h))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(h))


# ---------------------------------------------------------------- masked parameters

MASK = {"w": True, "b": False}
CURE = r"masked params.*hessian=sample.*mask_compatible_extra_args=True"


def wrap(wrapper, tx, **arguments):
    if wrapper == "masked":
        return optax.masked(tx, MASK, **arguments)
    labels = {"w": "sophia", "b": "rest"}
    return optax.partition({"sophia": tx, "rest": optax.identity()}, labels, **arguments)


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
@pytest.mark.parametrize("factory", FACTORIES)
def test_masked_params_are_refused_and_a_sample_from_outside_is_the_cure(factory, wrapper):
    estimate = factory()
    tx = wrap(wrapper, hessian_estimate(estimate))
    with pytest.raises(ValueError, match=CURE):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **EXTRA)
    outside = sample(estimate, **EXTRA)
    with pytest.raises(ValueError, match=r"structure.*mask_compatible_extra_args=True"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, hessian=outside)
    tx = wrap(wrapper, hessian_estimate(estimate), mask_compatible_extra_args=True)
    h, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, hessian=outside)
    np.testing.assert_allclose(h["w"], outside["w"], rtol=1e-6)
    np.testing.assert_array_equal(h["b"], PARAMS["b"])


@pytest.mark.parametrize("compatible", [True, False])
@pytest.mark.parametrize("factory", FACTORIES)
def test_a_single_array_under_masked_is_estimated_or_refused(factory, compatible):
    """Every extra argument then has the structure of params, so a hole masks all of them."""
    params = jnp.array([0.5, -1.0])
    extra = {"obj_fn": lambda p: jnp.sum(p**4), "logits_fn": lambda p: X * p}
    tx = hessian_estimate(factory())
    kept, hole = (optax.masked(tx, m, mask_compatible_extra_args=compatible) for m in (True, False))
    want, _ = tx.update(params, tx.init(params), params, **extra)
    h, _ = kept.update(params, kept.init(params), params, **extra)
    np.testing.assert_array_equal(h, want)
    with pytest.raises(ValueError, match=CURE + ".*wrap it in a dict"):
        hole.update(params, hole.init(params), params, **extra)


# ---------------------------------------------------------------- dtypes and trees


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("mode", ["forward", "reverse", "gnb"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_params_give_float32_samples_near_those_of_float32(dtype, mode):
    estimate = gauss_newton_bartlett(groups=2) if mode == "gnb" else hutchinson(mode=mode)
    narrow = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    h = sample(estimate, narrow, **EXTRA)
    assert dtypes(h) == {"float32"}
    want = sample(estimate, **EXTRA)
    for name in want:
        np.testing.assert_allclose(h[name], want[name], atol=0.05 * np.abs(want[name]).max())


@pytest.mark.parametrize("mode", ["forward", "reverse", "gnb"])
def test_float64_params_give_float64_samples(mode):
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda x: np.asarray(x, np.float64), (PARAMS, X))
        params, extra = jax.tree.map(jnp.asarray, params), {**EXTRA, "inputs": x}
        if mode == "gnb":
            estimate = gauss_newton_bartlett(groups=2, num_samples=2)
            h = sample(estimate, params, **extra, weights=np.ones(8))
        else:
            h = sample(hutchinson(mode=mode, num_samples=2), params, **extra)
        assert dtypes(h) == {"float64"}
        assert dtypes(squared_gradient()(KEY, None, params)) == {"float64"}


MIXED = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"], "none": None, "s": jnp.array(0.5)}


def mixed_logits(params, x):
    return (x @ params["w"].astype(x.dtype) + params["b"]) * params["s"]


def mixed_loss(params, x):
    return jnp.mean(jnp.square(mixed_logits(params, x)))


@pytest.mark.parametrize(
    "estimate",
    [
        hutchinson(),
        hutchinson(mode="reverse", probe="normal", num_samples=2),
        gauss_newton_bartlett(groups=2, num_samples=2),
        gauss_newton_bartlett(likelihood="gaussian", batch_fraction=0.5),
        gauss_newton_bartlett(likelihood="bernoulli"),
        squared_gradient(scale=2.0),
    ],
    ids=["forward", "reverse", "categorical", "gaussian", "bernoulli", "squared_gradient"],
)
def test_mixed_trees_with_none_and_scalars_pass_strict_promotion(estimate):
    extra = {"obj_fn": mixed_loss, "logits_fn": mixed_logits, "inputs": X}
    with jax.numpy_dtype_promotion("strict"):
        h = sample(estimate, MIXED, **extra)
    assert jax.tree.structure(h) == jax.tree.structure(MIXED)
    assert jax.tree.map(jnp.shape, h) == jax.tree.map(jnp.shape, MIXED)
    assert dtypes(h) == {"float32"}


def test_strict_promotion_takes_weights_of_any_dtype():
    with jax.numpy_dtype_promotion("strict"):
        samples = [
            sample(gauss_newton_bartlett(), **EXTRA, weights=weights)
            for weights in (jnp.ones(8, jnp.bfloat16), np.ones(8, bool), np.ones(8, np.int32))
        ]
    for h in samples:
        jax.tree.map(np.testing.assert_array_equal, h, samples[0])


def test_a_scalar_parameter_is_a_tree():
    assert hutchinson()(KEY, jnp.array(2.0), None, obj_fn=lambda p: p**3) == 12
    gnb = gauss_newton_bartlett(likelihood="gaussian", num_samples=500)
    h = gnb(KEY, jnp.array(2.0), None, logits_fn=lambda p: jnp.array([[3.0]]) * p)
    assert h.shape == () and abs(h - 9) < 5 * 9 * np.sqrt(2 / 500)


@pytest.mark.parametrize("params", [{}, (), {"none": None}])
def test_no_parameters_give_no_curvature(params):
    extra = {"obj_fn": lambda params, x: jnp.mean(x), "logits_fn": lambda params, x: x, "inputs": X}
    for estimate in (hutchinson(), hutchinson(mode="reverse"), gauss_newton_bartlett(groups=2)):
        assert estimate(KEY, params, None, **extra) == params


def test_weights_with_a_sampled_loss_fn_are_refused():
    loss = lambda params, inputs, key: (jnp.sum(params), 1)  # noqa: E731
    extra = {"sampled_loss_fn": loss, "inputs": jnp.ones(4), "weights": jnp.ones(4)}
    with pytest.raises(ValueError, match="weighs its own outputs"):
        gauss_newton_bartlett()(jax.random.key(0), jnp.ones(3), None, **extra)
