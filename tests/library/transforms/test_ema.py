"""ema against weighted sums over the whole history of the gradient, and against optax.ema."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from averages import B1, SHIFTED, momentum, outputs, weighted_mean
from paths import STEPS

from sophia_optax import ema


@pytest.mark.parametrize("corrected", [True, False])
def test_the_first_moment_is_the_weighted_mean(corrected):
    with jax.enable_x64(True):
        out, state = outputs(ema(B1, debias=corrected), SHIFTED)
        for n, g in SHIFTED.items():
            for t in (1, 2, 9, STEPS):
                expected = (1 if corrected else 1 - B1**t) * weighted_mean(g, B1, t)
                np.testing.assert_allclose(out[n][t - 1], expected, rtol=1e-12)
        assert state.count == STEPS


def test_in_float32_it_is_the_ema_of_optax_and_its_state():
    """Up to rounding by the compiler: checkpoints of one can be read by the other."""
    (ours, mine), (theirs, state) = (outputs(f(B1), SHIFTED, "float32") for f in (first, momentum))
    assert jax.tree.structure(mine) == jax.tree.structure(state)
    for n in SHIFTED:
        np.testing.assert_allclose(ours[n], theirs[n], rtol=1e-6, atol=1e-7)


def first(decay):
    return ema(decay)


def test_a_bfloat16_momentum_is_given_out_as_it_is_stored():
    """Rounded once a step, from sums in float32, with a decay that is not rounded."""
    out, state = outputs(ema(0.965, debias=False, accumulator_dtype="bfloat16"), SHIFTED, "float32")
    m = {n: np.zeros(g.shape[1:], jnp.bfloat16) for n, g in SHIFTED.items()}
    for t in range(STEPS):
        for n, g in SHIFTED.items():
            exact = 0.965 * m[n].astype(float) + 0.035 * g[t].astype(np.float32)
            assert out[n].dtype == jnp.float32
            stored = np.asarray(out[n][t]).astype(jnp.bfloat16)
            np.testing.assert_array_equal(stored.astype(np.float32), out[n][t])
            # half a unit in the last place, and a little for a sum in float32
            error = np.abs(stored.astype(float) - exact)
            assert (error <= 2.0**-8 * (1 + 1e-4) * np.abs(exact)).all()
            m[n] = stored
    for n in m:
        assert state.ema[n].dtype == jnp.bfloat16
        np.testing.assert_array_equal(state.ema[n].astype(np.float32), m[n].astype(np.float32))


def test_the_decay_of_a_bfloat16_momentum_is_not_rounded():
    """Averaged over m; .99 rounds to .9883 in bfloat16."""
    tx = ema(0.99, debias=False, accumulator_dtype="bfloat16")
    n = 1 << 14
    m = jnp.asarray(np.random.default_rng(0).uniform(1, 2, n), jnp.bfloat16)
    out, _ = tx.update(jnp.zeros(n), optax.EmaState(jnp.int32(5), m))
    rounding = 2.0**-7 / np.sqrt(12 * 128)  # m has 128 values
    assert abs((np.asarray(out) / m.astype(np.float32)).mean() - 0.99) < 4 * rounding


@pytest.mark.parametrize(
    ("params", "dtype", "held", "given_out"),
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "bfloat16", "float32"),
        ("float64", None, "float64", "float64"),
        ("float64", "float32", "float32", "float64"),
        ("bfloat16", "float32", "float32", "float32"),
    ],
)
def test_momentum_is_held_like_the_parameter_unless_stated(params, dtype, held, given_out):
    """Also where a traced float32 decay would widen it."""
    with jax.enable_x64(True):
        x = jnp.ones(2, params)
        for decay in (0.9, jnp.float32(0.9)):
            tx = ema(decay, accumulator_dtype=dtype)
            m, state = tx.update(x, tx.init(x))
            assert (tx.init(x).ema.dtype, state.ema.dtype, m.dtype) == (held, held, given_out)


def test_the_first_moment_needs_no_implicit_promotion():
    g = {"a": jnp.ones((), jnp.bfloat16), "b": jnp.ones(3)}
    with jax.numpy_dtype_promotion("strict"):
        for dtype in (None, "bfloat16"):
            tx = ema(0.9, accumulator_dtype=dtype)
            jax.eval_shape(lambda s, tx=tx: tx.update(g, s), tx.init(g))
