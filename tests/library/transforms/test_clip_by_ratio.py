"""clip_by_ratio: the ratio, its bound, its denominators, and what a radius makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ratios import (
    DENOMINATORS,
    RNG,
    H,
    M,
    V,
    given_curvature,
    given_moment,
    identity,
    program,
    ratio,
    updated,
)

from sophia_optax import (
    clip_by_ratio,
    floor,
    hessian_estimate,
    rms_floor,
    second_moment,
    shift,
    squared_gradient,
)

TINY = np.finfo(np.float32).tiny


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("threshold", [1.0, 0.2, 30.0, None])
@pytest.mark.parametrize("name", DENOMINATORS)
def test_the_update_is_the_clipped_ratio(name, threshold, two_sided):
    denominator, formula, _ = DENOMINATORS[name]
    tx = ratio(denominator, clip_threshold=threshold, two_sided=two_sided)
    u, _ = updated(tx)
    for n in M:
        bound = np.inf if threshold is None else threshold
        expected = np.clip(M[n] / formula(H[n]), -bound if two_sided else -np.inf, bound)
        np.testing.assert_allclose(u[n], expected, rtol=1e-5)


def test_momentum_and_curvature_are_fed_the_same_gradient():
    """In a chain the curvature would receive the momentum instead."""
    tx = clip_by_ratio(
        optax.ema(0.9, debias=False, accumulator_dtype=None),
        hessian_estimate(squared_gradient(), decay=0.5, update_interval=1, bias_correction=False),
        denominator=shift(1.0),
        clip_threshold=None,
    )
    g, state, m, h = RNG.normal(size=(5, 3)), tx.init(jnp.zeros(3)), 0.0, 0.0
    for t in range(5):
        u, state = tx.update(jnp.asarray(g[t], jnp.float32), state)
        m, h = 0.9 * m + 0.1 * g[t], 0.5 * h + 0.5 * g[t] ** 2
        np.testing.assert_allclose(u, m / (h + 1), rtol=1e-5)


@pytest.mark.parametrize(
    "denominator", [floor(1.0, 0.0), shift(0.0), floor(0.0, 0.0), rms_floor(1.0, 0.0)]
)
def test_the_floor_is_the_smallest_normal_float32(denominator):
    zero = jnp.array([0.0, -0.0])
    np.testing.assert_array_equal(denominator(zero, zero), TINY)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("denominator", [floor(0.1), shift(1e-15), floor(1.0, 0.0), rms_floor()])
@pytest.mark.parametrize("curvature", [given_curvature, identity])
def test_zero_over_zero_is_zero(curvature, denominator, dtype):
    """All floors are 0 in float16; the curvature need not be one of our transformations."""
    with jax.enable_x64(True):
        g = jnp.zeros(3, dtype)
        tx = ratio(denominator, curvature=curvature())
        u, _ = tx.update(g, tx.init(g))
        assert u.dtype == g.dtype and not u.any()


def test_the_ratio_is_computed_in_float32_and_cast_last():
    g = jnp.array([3e-4, 1.0], jnp.float16)  # their squares underflow in float16
    tx = ratio(floor(1.0, 1e-12), clip_threshold=None)
    u, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(u, 1 / np.asarray(g, np.float32), rtol=1e-3)


def test_float64_keeps_its_precision():
    with jax.enable_x64(True):
        m, h = jnp.array([1 / 3]), jnp.array([1 / 7])
        tx = ratio(floor(1.0), clip_threshold=None)
        u, _ = tx.update(m, tx.init(m), hessian=h)
        np.testing.assert_allclose(u, 7 / 3, rtol=1e-15)


@pytest.mark.parametrize("threshold", [0.3, None])
def test_curvature_below_the_root_of_the_second_moment_leaves_adam(threshold):
    """The max form: u = clip(m / (max(gamma h, sqrt(v)) + eps))."""
    tx = ratio(rms_floor(0.5, 0.1), second_moment=given_moment(), clip_threshold=threshold)
    u, _ = updated(tx)
    bound, adams = threshold or np.inf, []
    for n in M:
        adams.append(np.ravel(0.5 * H[n] < np.sqrt(V[n])))
        expected = np.clip(M[n] / (np.maximum(0.5 * H[n], np.sqrt(V[n])) + 0.1), -bound, bound)
        np.testing.assert_allclose(u[n], expected, rtol=1e-5)
    assert 0.2 < np.concatenate(adams).mean() < 0.8


def test_without_a_second_moment_the_root_is_that_of_the_curvature():
    """The root is that of h itself, before gain and radius scale it."""
    h = {n: np.abs(x) for n, x in H.items()}
    tx = ratio(rms_floor(1.0, 0.1), gain=lambda m, h: 0.5, clip_threshold=None)
    u, _ = updated(tx, h=h, radius=jnp.asarray(0.8))
    for n in M:
        expected = 0.8 * M[n] / (np.maximum(0.8 * 0.5 * h[n], np.sqrt(h[n])) + 0.1)
        np.testing.assert_allclose(u[n], expected, rtol=1e-5)


def test_the_second_moment_is_fed_the_gradient_and_not_the_momentum():
    tx = ratio(
        rms_floor(0.0, 0.1),
        momentum=optax.ema(0.5, debias=True, accumulator_dtype=None),
        second_moment=second_moment(0.5),
        clip_threshold=None,
    )
    state, g = tx.init(jnp.zeros(3)), RNG.normal(size=(2, 3))
    for t in range(2):
        u, state = tx.update(jnp.asarray(g[t], jnp.float32), state)
    m, v = (x[0] / 3 + x[1] * 2 / 3 for x in (g, g**2))
    np.testing.assert_allclose(u, m / (np.sqrt(v) + 0.1), rtol=1e-5)


def test_the_gain_is_a_factor_on_h_from_the_whole_trees():
    seen = []

    def gain(m, h):
        seen.append((m, h))
        return sum(map(jnp.vdot, jax.tree.leaves(m), jax.tree.leaves(h)))

    u, _ = updated(ratio(floor(0.5, 0.1), gain=gain, clip_threshold=None))
    factor = sum((M[n] * H[n]).sum() for n in M)
    for n in M:
        expected = M[n] / np.maximum(0.5 * factor * H[n], 0.1)
        np.testing.assert_allclose(u[n], expected, rtol=1e-4)
    ((m, h),) = seen
    np.testing.assert_allclose((m["b"], h["b"]), (M["b"], H["b"]), rtol=1e-6)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("threshold", [0.4, None])
@pytest.mark.parametrize("r", [0.75, 1.0, 1.9])
def test_a_radius_leaves_newton_steps_and_scales_every_other(r, threshold, two_sided):
    """The ratio r m / max(r gamma h, eps), bounded by r times the threshold."""
    tx = ratio(floor(0.5, 0.1), clip_threshold=threshold, two_sided=two_sided)
    u, state = updated(tx, radius=jnp.asarray(r))
    bound, linear, quadratic = r * threshold if threshold else np.inf, 0.0, 0.0
    for n in M:
        full = r * M[n] / np.maximum(0.5 * r * H[n], 0.1)
        expected = np.clip(full, -bound if two_sided else -np.inf, bound)
        np.testing.assert_allclose(u[n], expected, rtol=1e-5)
        newton = (0.5 * r * H[n] > 0.1) & (np.abs(full) < bound)
        step = M[n] / np.where(newton, 0.5 * H[n], np.inf)
        np.testing.assert_allclose(np.where(newton, u[n], 0), step, rtol=1e-5)
        linear += (M[n] * expected).sum()
        quadratic += (H[n] * expected**2).sum()
    np.testing.assert_allclose(state.predicted_reduction, (linear, quadratic), rtol=1e-5)


def test_without_a_radius_no_sums_are_taken():
    tx = ratio(floor(1.0), curvature=identity(), statistics=False)
    _, state = updated(tx)
    assert state.predicted_reduction == (0, 0)
    assert "reduce_sum[" not in program(tx)()
    assert "reduce_sum[" in program(tx, radius=1.0)()


def test_the_sums_are_float64_where_a_parameter_is():
    with jax.enable_x64(True):
        m = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.full(2, 1 / 3)}
        tx = ratio(floor(1.0, 1.0))
        u, state = tx.update(m, tx.init(m), radius=jnp.asarray(1.0))
        assert {n: x.dtype for n, x in u.items()} == {"a": "bfloat16", "b": "float64"}
        assert {x.dtype.name for x in state.predicted_reduction} == {"float64"}
        np.testing.assert_allclose(state.predicted_reduction.linear, 2 + 2 / 9, rtol=1e-14)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: floor(-0.1), "gamma=-0.1 is outside"),
        (lambda: floor(0.1, -1.0), "eps=-1.0 is outside"),
        (lambda: shift(-1.0), "eps=-1.0 is outside"),
        (lambda: shift(0.1, -2.0), "rho=-2.0 is outside"),
        (lambda: floor(float("nan")), "gamma=nan is outside"),
        (lambda: rms_floor(-0.1), "gamma=-0.1 is outside"),
        (lambda: rms_floor(0.1, -1.0), "eps=-1.0 is outside"),
        (lambda: ratio(floor(1.0), clip_threshold=-1.0), "clip_threshold=-1.0 is outside"),
        (lambda: ratio(floor(1.0), clip_threshold=0), "None turns clipping off"),
        (lambda: ratio(floor(1.0), statistics_fraction=1.5), "statistics_fraction=1.5 is outside"),
        (
            lambda: ratio(floor(1.0), statistics_fraction=-0.1),
            "statistics_fraction=-0.1 is outside",
        ),
        (lambda: ratio(floor(1.0), statistics_fraction=0), "statistics=False takes none"),
    ],
)
def test_arguments_out_of_range_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_traced_arguments_pass():
    @jax.jit
    def run(gamma, eps, threshold):
        return updated(ratio(floor(gamma, eps), clip_threshold=threshold))

    u, state = run(0.5, 0.1, 0.4)
    expected, _ = updated(ratio(floor(0.5, 0.1), clip_threshold=0.4))
    np.testing.assert_allclose(u["b"], expected["b"], rtol=1e-6)
    assert state.clipped > 0
    np.testing.assert_allclose(jax.jit(lambda e, r: shift(e, r)(jnp.ones(2)))(0.5, 2.0), 2.5)


def test_our_own_arithmetic_needs_no_implicit_promotion():
    g = {"a": jnp.ones((), jnp.bfloat16), "b": jnp.ones(3)}
    with jax.numpy_dtype_promotion("strict"):
        for denominator in (floor(1.0), shift(1.0), rms_floor()):
            tx = ratio(denominator, second_moment=second_moment(0.9), gain=lambda m, h: 2.0)
            for extra in ({}, {"radius": jnp.asarray(1.0)}):
                jax.eval_shape(lambda s, tx=tx, x=extra: tx.update(g, s, **x), tx.init(g))
