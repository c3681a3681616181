"""Constructors check numbers and dtypes, after the cast, and errors name the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import OPTIMIZERS

import sophia_optax
from sophia_optax import (
    clip_by_ratio,
    ema,
    floor,
    gauss_newton_bartlett,
    gradient_magnitude,
    hessian_estimate,
    hutchinson,
    orthosoph,
    second_moment,
    soaa,
    sophia_g,
    sophia_geometric,
    sophia_h,
    sophia_lite,
    squared_gradient,
    trust_region,
    weighted_squared_gradient,
)

NAN, INF = float("nan"), float("inf")
FACTORIES = {
    "sophia_h": sophia_h,
    "sophia_g": sophia_g,
    "sophia_lite": sophia_lite,
    "sophia_geometric": sophia_geometric,
    "orthosoph": orthosoph,
    "soaa": lambda learning_rate, **arguments: soaa(learning_rate, 100, **arguments),
}
every_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
GRADS = jax.tree.map(lambda x: 0.1 * x, PARAMS)


@every_factory
@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "eps"])
def test_a_number_that_is_not_finite_is_refused(factory, name, number):
    with pytest.raises(ValueError, match=rf"^{name}={number} "):
        factory(**({"learning_rate": 0.1} | {name: number}))


@every_factory
@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize("decay", [1 - 1e-9, np.float64(1 - 1e-12), NAN, 1.0, -0.1])
def test_a_decay_of_1_after_the_cast_is_refused(factory, name, decay):
    """`1 - 1e-9` is 1 in float32, which made parameters NaN within 12 steps."""
    with pytest.raises(ValueError, match=rf"^{name}="):
        factory(0.1, **{name: decay}).init(PARAMS)


@every_factory
def test_the_largest_decay_that_the_message_allows_is_taken(factory):
    updates, _ = factory(0.1, b1=0.999999881).update(
        GRADS, factory(0.1).init(PARAMS), PARAMS, hessian=GRADS, value=1.0
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ema(1 - 1e-9),
        lambda: second_moment(1 - 1e-9),
        lambda: hessian_estimate(None, decay=1 - 1e-9),
        lambda: trust_region(optax.identity(), 0.1, total_steps=10, b1=1 - 1e-9),
    ],
)
def test_a_link_alone_refuses_it_as_well(make):
    with pytest.raises(ValueError, match="is 1 in float32"):
        make()


def test_in_double_precision_the_leaf_decides():
    with jax.enable_x64(True):
        tx = ema(1 - 1e-9)
        tx.init({"w": jnp.ones(2, jnp.float64)})
        with pytest.raises(ValueError, match=r"in which params\['w'\] is averaged"):
            tx.init({"w": jnp.ones(2, jnp.float32)})


def test_an_injected_decay_that_bfloat16_rounds_to_1_is_refused():
    """Injected numbers take the dtype of the parameters unless another one is given."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = optax.inject_hyperparams(sophia_lite, static_args="weight_decay_mask")(0.1, b2=0.999)
    with pytest.raises(ValueError, match=r"b2=1.0 is outside \[0, 1\)"):
        tx.init(params)


# ---------------------------------------------------------------- dtypes


@every_factory
@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float8_e4m3fn", "no_such_dtype"])
def test_a_dtype_in_which_momentum_does_not_move_is_refused(factory, dtype):
    with pytest.raises(ValueError, match=f"^mu_dtype='?{dtype}"):
        factory(0.1, mu_dtype=dtype)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float8_e5m2", "no_such_dtype"])
def test_a_dtype_that_cannot_hold_curvature_is_refused(dtype):
    for name, factory in FACTORIES.items():
        if name != "orthosoph":
            with pytest.raises(ValueError, match=f"^hessian_dtype='?{dtype}"):
                factory(0.1, hessian_dtype=dtype)


@pytest.mark.parametrize("number", [NAN, INF, 0, 1.5, -1, -(10**400)])
def test_counts_of_steps_are_integers(number):
    for make in (
        lambda: sophia_h(0.1, update_interval=number),
        lambda: orthosoph(0.1, update_interval=number),
        lambda: soaa(0.1, total_steps=number),
        lambda: gauss_newton_bartlett(groups=number),
    ):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            make()


# ---------------------------------------------------------------- functions of another form


@pytest.mark.parametrize(
    "factory", [hutchinson, gauss_newton_bartlett, gradient_magnitude, squared_gradient]
)
def test_an_estimator_without_its_parentheses_is_told_when_it_is_passed(factory):
    with pytest.raises(TypeError, match=rf"estimator={factory.__name__} cannot.*parentheses"):
        sophia_h(0.1, estimator=factory)


@pytest.mark.parametrize(
    "estimator",
    [
        hutchinson(),
        gauss_newton_bartlett(),
        squared_gradient(),
        gradient_magnitude(),
        weighted_squared_gradient(),
    ],
)
def test_inject_hyperparams_over_an_estimator_names_the_cure(estimator):
    make = optax.inject_hyperparams(sophia_h)
    with pytest.raises(TypeError, match=r"static_args=..estimator"):
        make(0.1, estimator=estimator).init(PARAMS)
    cured = optax.inject_hyperparams(sophia_h, static_args=("estimator", "weight_decay_mask"))
    cured(0.1, estimator=estimator).init(PARAMS)


@pytest.mark.parametrize("denominator", [lambda h: h, floor, 3.0, None])
def test_a_denominator_of_another_form_is_told_when_it_is_passed(denominator):
    with pytest.raises(TypeError, match=r"cannot be called as \(h, v\)"):
        clip_by_ratio(optax.ema(0.9), hessian_estimate(None), denominator=denominator)


# ---------------------------------------------------------------- parameters that are not needed


@every_factory
def test_without_weight_decay_parameters_are_not_needed(factory):
    tx = factory(0.1, weight_decay=0.0)
    without, _ = tx.update(GRADS, tx.init(PARAMS), hessian=GRADS, value=1.0)
    given, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, hessian=GRADS, value=1.0)
    jax.tree.map(np.testing.assert_array_equal, without, given)


@every_factory
def test_with_weight_decay_they_are_asked_for(factory):
    tx = factory(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(GRADS, tx.init(PARAMS), hessian=GRADS, value=1.0)


@every_factory
@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (jax.random.key(0), "key<fry>"),
        (jnp.ones(2, jnp.float8_e4m3fn), "float8_e4m3fn"),
        ("x", "a str"),
    ],
)
def test_a_leaf_that_cannot_be_averaged_is_named(factory, leaf, kind):
    with pytest.raises(ValueError, match=rf"params\['a'\] is {kind}\. "):
        factory(0.1).init({"a": leaf, "b": jnp.ones(2)})


@pytest.mark.parametrize("name", ["b1", "gamma", "eps", "clip_threshold", "update_interval"])
def test_a_schedule_in_the_place_of_a_number_names_the_wrapper(name):
    with pytest.raises(TypeError, match=f"{name} is a function.*inject_hyperparams"):
        sophia_h(0.1, **{name: lambda count: 0.5})


@pytest.mark.parametrize("name", ["learning_rate", "b1", "gamma", "weight_decay"])
@pytest.mark.parametrize("value", [None, "x"])
def test_what_is_no_number_is_refused(name, value):
    """Optax reads a learning rate of None as no scaling: unscaled steps uphill."""
    with pytest.raises(TypeError, match="is not a number"):
        sophia_h(**{"learning_rate": 0.1, name: value})


def test_a_complex_sample_is_refused():
    """The cast to a real dtype would drop its imaginary part."""
    tx, params = sophia_h(0.1), {"w": jnp.ones(2)}
    sample = {"w": jnp.array([1 + 1j, 2])}
    with pytest.raises(ValueError, match=r"complex64 at \['w'\]"):
        tx.update(params, tx.init(params), params, hessian=sample)


def test_a_variance_may_be_traced_or_an_array():
    """Its square root is taken by jax, not by Python's math."""
    x, params = jnp.ones((4, 2)), jnp.ones((2, 3))

    def sample(variance):
        gnb = gauss_newton_bartlett(likelihood="gaussian", variance=variance)
        return gnb(jax.random.key(0), params, None, logits_fn=lambda w: x @ w)

    np.testing.assert_allclose(jax.jit(sample)(4.0), sample(1.0) / 4, rtol=1e-6)
    gauss_newton_bartlett(variance=jnp.float32(1))


@pytest.mark.parametrize("classes", [0, 1])
def test_a_softmax_over_less_than_two_classes_is_refused(classes):
    x, params = jnp.ones((4, 2)), jnp.ones((2, classes))
    with pytest.raises(ValueError, match="bernoulli"):
        gauss_newton_bartlett()(jax.random.key(0), params, None, logits_fn=lambda w: x @ w)


@every_factory
def test_a_complex_gradient_of_real_parameters_is_refused(factory):
    """Otherwise its imaginary part would be dropped or make the step complex."""
    tx, grads = factory(0.1), jax.tree.map(lambda g: g * (1 + 1j), GRADS)
    with pytest.raises(ValueError, match="the gradient is complex64 at"):
        tx.update(grads, tx.init(PARAMS), PARAMS, hessian=GRADS, value=1.0)


def test_every_optimizer_is_in_the_tables_of_the_contract_and_of_this_file():
    public = [getattr(sophia_optax, name) for name in sophia_optax.__all__]
    ours = [x for x in public if x.__module__.startswith("sophia_optax.optimizers.")]
    assert {x.__name__ for x in ours} == set(FACTORIES)
    assert set(ours) <= {row.factory for row in OPTIMIZERS.values()}
