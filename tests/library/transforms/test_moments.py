"""Second moments against weighted sums over the whole history of the gradient, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from averages import B1, B2, SHIFTED, momentum, outputs, weighted_mean
from paths import GRADS, PARAMS, SAMPLES, STEPS, cast, row

from sophia_optax import (
    centered_second_moment,
    clip_by_ratio,
    ema,
    hessian_estimate,
    rms_floor,
    second_moment,
    squared_gradient,
)


def centered(b1=B1, b2=B2, eps=0.0, **arguments):
    """The centred moment of the raw gradient, given the momentum of the same gradient."""
    moment, mean = centered_second_moment(b1, b2, eps, **arguments), momentum(b1)

    def update(updates, state, params=None):
        m, first = mean.update(updates, state[0])
        v, second = moment.update(updates, state[1], momentum=m)
        return v, (first, second)

    return optax.GradientTransformation(lambda p: (mean.init(p), moment.init(p)), update)


# ---------------------------------------------------------------- Adam's


@pytest.mark.parametrize("corrected", [True, False])
def test_the_second_moment_is_the_weighted_mean_of_squares(corrected):
    with jax.enable_x64(True):
        out, _ = outputs(second_moment(B2, bias_correction=corrected), SHIFTED)
        for n, g in SHIFTED.items():
            for t in (1, 2, 9, STEPS):
                scale = 1 if corrected else 1 - B2**t
                expected = scale * weighted_mean(g**2, B2, t)
                np.testing.assert_allclose(out[n][t - 1], expected, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_coordinate_that_is_not_finite_keeps_its_second_moment_and_spares_the_others(bad):
    tx = second_moment(0.5, bias_correction=False)
    _, state = tx.update(jnp.array([1.0, 2.0]), tx.init(jnp.zeros(2)))
    v, _ = tx.update(jnp.array([bad, 2.0]), state)
    np.testing.assert_allclose(v, [0.5, 3.0])


@pytest.mark.parametrize("place", ["curvature", "second_moment"])
def test_the_second_moment_hears_nothing_of_refreshes_and_of_samples(place):
    """In either place of `clip_by_ratio`: both arguments concern curvature only."""

    def ratio(**told):
        other = "second_moment" if place == "curvature" else "curvature"
        silent = hessian_estimate(squared_gradient(), update_interval=1)
        moments = {place: second_moment(B2), other: silent}
        tx = clip_by_ratio(momentum(), denominator=rms_floor(1.0, 1e-3), **moments)
        return getattr(outputs(tx, GRADS, "float32", lambda t: told)[1], place)

    jax.tree.map(
        np.testing.assert_array_equal,
        ratio(),
        ratio(refresh=False, hessian=row(cast(SAMPLES, "float32"), 0)),
    )


# ---------------------------------------------------------------- Tadam's


def test_with_equal_decays_the_centered_moment_is_the_exactly_weighted_variance():
    with jax.enable_x64(True):
        out, _ = outputs(centered(B2, B2), SHIFTED)
        for n, g in SHIFTED.items():
            assert not out[n][0].any()  # one number has no variance
            for t in (2, 3, 9, STEPS):
                gap = g - weighted_mean(g, B2, t)
                np.testing.assert_allclose(out[n][t - 1], weighted_mean(gap**2, B2, t), rtol=1e-10)


def test_with_other_decays_each_gap_is_to_the_corrected_momentum_before():
    """The initial value eps decays like every other contribution."""
    eps = 0.3
    with jax.enable_x64(True):
        out, _ = outputs(centered(B1, B2, eps), SHIFTED)
        for n, g in SHIFTED.items():
            v = np.full(g.shape[1:], eps)
            for t in range(1, STEPS + 1):
                before = weighted_mean(g, B1, t - 1) if t > 1 else 0
                factor = (B2 - B2**t) / (1 - B2**t)
                v = B2 * v + (1 - B2) * factor * (g[t - 1] - before) ** 2
                np.testing.assert_allclose(out[n][t - 1], v / (1 - B2**t), rtol=1e-10)


def test_a_constant_gradient_has_no_variance():
    with jax.enable_x64(True):
        constant = {n: np.broadcast_to(x, (STEPS, *x.shape)) for n, x in PARAMS.items()}
        out, _ = outputs(centered(0.9, 0.999), constant)
        assert all(np.abs(v).max() < 1e-28 for v in out.values())


def test_float32_is_close_to_float64_at_the_decays_of_adam():
    """At first 1 - b2^t cancels: its last bit is 6e-5 of 1e-3."""
    with jax.enable_x64(True):
        exact, _ = outputs(centered(0.9, 0.999, 1e-8), SHIFTED)
    out, _ = outputs(centered(0.9, 0.999, 1e-8), SHIFTED, "float32")
    for n in out:
        np.testing.assert_allclose(out[n], exact[n], rtol=2e-4, atol=1e-6)


def test_without_momentum_the_error_names_the_cure():
    tx, g = centered_second_moment(0.9, 0.99), jnp.ones(2)
    message = "centered_second_moment needs `momentum`.*curvature of `clip_by_ratio`"
    with pytest.raises(ValueError, match=message):
        tx.update(g, tx.init(g))


def test_a_ratio_tells_its_curvature_the_momentum():
    """The momentum of the same update."""
    told = []

    def update(updates, state, params=None, *, momentum, **extra):
        told.append(momentum)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = clip_by_ratio(momentum(0.5), spy, denominator=rms_floor())
    state = tx.init(jnp.zeros(1))
    for g in (1.0, 4.0):
        _, state = tx.update(jnp.array([g]), state)
    np.testing.assert_allclose(told, [[1.0], [3.0]])


# ---------------------------------------------------------------- dtypes

MOMENTS = {"second": lambda **kw: second_moment(B2, **kw), "centered": centered}
every_moment = pytest.mark.parametrize("name", MOMENTS)


@every_moment
@pytest.mark.parametrize(
    ("params", "dtype", "held", "given_out"),
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "float32", "float32"),
        ("float16", None, "float32", "float32"),
        ("float64", None, "float64", "float64"),
        ("float64", "float32", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16", "float32"),
    ],
)
def test_moments_are_float32_at_least_unless_stated_and_given_out_so(
    name, params, dtype, held, given_out
):
    with jax.enable_x64(True):
        tx, x = MOMENTS[name](dtype=dtype), jnp.zeros(2, params)
        state = jax.eval_shape(tx.init, x)
        v, after = jax.eval_shape(tx.update, x, state)
        moment = {"second": lambda s: s.h, "centered": lambda s: s[1].nu}[name]
        assert (moment(state).dtype, moment(after).dtype, v.dtype) == (held, held, given_out)


def test_squares_are_taken_in_float32():
    """Squares of float16 gradients may overflow in float16."""
    expected = {"second": 1000**2, "centered": 2000**2 * (1 / 3) * (2 / 3)}
    for name, tx in {"second": second_moment(0.5), "centered": centered(0.5, 0.5)}.items():
        state, step = tx.init(jnp.zeros(1, jnp.float16)), jax.jit(tx.update)
        for g in (1000.0, -1000.0):
            v, state = step(jnp.array([g], jnp.float16), state)
        np.testing.assert_allclose(v, expected[name], rtol=1e-2)


@pytest.mark.parametrize(
    "moment", [second_moment, lambda b, **kw: centered_second_moment(b, b, **kw)]
)
def test_dtypes_that_cannot_hold_a_moment_are_refused(moment):
    with pytest.raises(ValueError, match=r"cannot hold curvature.*'bfloat16'"):
        moment(0.9, dtype="float16")


@every_moment
def test_bfloat16_reaches_the_level_where_rounding_to_nearest_stalls(name):
    """Gradients alternate between 3 and 5: their mean square is 17, their variance 1."""
    decay, steps, width = 0.99, 600, 1024
    long = {"b1": decay, "b2": decay} if name == "centered" else {}
    tx = centered(**long, dtype="bfloat16") if long else second_moment(decay, dtype="bfloat16")

    def step(carry, t):
        state, nearest = carry
        g = 4 + (-1.0) ** t
        _, state = tx.update(jnp.full(width, g), state)
        gap = (g - 4) ** 2 if long else g**2
        nearest = (decay * nearest.astype(float) + (1 - decay) * gap).astype(jnp.bfloat16)
        return (state, nearest), None

    start = (tx.init(jnp.zeros(width)), jnp.zeros([], jnp.bfloat16))
    (state, nearest), _ = jax.lax.scan(step, start, jnp.arange(steps, dtype=float))
    v, _ = tx.update(jnp.full(width, 4.0), state)
    level = 1.0 * decay if long else 17 * decay + 16 * (1 - decay)
    assert nearest < 0.95 * level
    np.testing.assert_allclose(v.mean(), level, rtol=5e-3)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ema(1.0), r"decay=1.0 is outside \[0, 1\)"),
        (lambda: second_moment(1.0), r"decay=1.0 is outside \[0, 1\)"),
        (lambda: centered_second_moment(1.0, 0.9), r"b1=1.0 is outside \[0, 1\)"),
        (lambda: centered_second_moment(0.9, -0.1), r"b2=-0.1 is outside \[0, 1\)"),
        (lambda: centered_second_moment(0.9, 0.9, -1.0), "eps=-1.0 is outside"),
        (lambda: centered_second_moment(0.0, 0.9), "b1=0: The previous momentum cannot"),
    ],
)
def test_arguments_out_of_range_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_traced_decays_pass():
    @jax.jit
    def run(b1, b2):
        return outputs(centered(b1, b2), SHIFTED, "float32")[0], second_moment(b2).init(PARAMS)

    out, _ = run(B1, B2)
    expected, _ = outputs(centered(), SHIFTED, "float32")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), out, expected)


@every_moment
def test_no_parameters_have_no_moment(name):
    tx = MOMENTS[name]()
    assert tx.update({}, tx.init({}))[0] == {}


def test_the_second_moment_needs_no_implicit_promotion():
    g = {"a": jnp.ones((), jnp.bfloat16), "b": jnp.ones(3)}
    tx = second_moment(B2)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda s: tx.update(g, s), tx.init(g))


def test_the_centered_moment_needs_no_implicit_promotion():
    g = {"a": jnp.ones((), jnp.bfloat16), "b": jnp.ones(3)}
    tx = centered_second_moment(0.9, 0.8)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda s: tx.update(g, s, momentum=g), tx.init(g))
