"""`inverse_square_root` against eigenvectors, over spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles_matrix import inverse_square_root as eigenvalue_root

from sophia_optax.transforms.inverse_root import inverse_square_root

rng = np.random.default_rng(0)


def with_spectrum(values):
    q = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return (q * values) @ q.T


def spectra(b, condition):
    """[4, b, b] of norm about 1: log-uniform, two-valued, one large, one small eigenvalue."""
    low, i = 1 / condition, np.arange(b)
    return np.stack(
        [
            with_spectrum(np.logspace(0, np.log10(low), b)),
            with_spectrum(np.where(i < b // 2, 1, low)),
            with_spectrum(np.where(i < 1, 1, low)),
            with_spectrum(np.where(i < b - 1, 1, low)),
        ]
    )


@pytest.mark.parametrize("b", [1, 2, 17, 64])
@pytest.mark.parametrize(
    ("dtype", "condition"),
    [("float32", c) for c in (1, 1e2, 1e4, 1e6)] + [("float64", 10.0**c) for c in range(0, 13, 3)],
)
def test_the_root_is_as_exact_as_the_condition_allows(dtype, condition, b):
    """An error of one ulp in C changes the root by one ulp times the condition number."""
    with jax.enable_x64(dtype == "float64"):
        C, ulp = spectra(b, condition).astype(dtype), np.finfo(dtype).eps
        floor = 4 * b * ulp * np.linalg.norm(C, axis=(-2, -1))[:, None]
        root = inverse_square_root(C, 0.0)
        assert root.dtype == dtype
    root = np.asarray(root, float)
    expected = eigenvalue_root(np.asarray(C, float), floor)
    error = np.linalg.norm(root - expected, axis=(-2, -1))
    scale = np.linalg.norm(expected, axis=(-2, -1))
    assert (error <= 20 * ulp * min(condition, 1 / (4 * b * ulp)) * scale).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_rank_deficient_block_has_the_root_of_its_floor(dtype):
    """Products of rounded numbers have eigenvalues of about -1 ulp, on which Newton diverges."""
    b = 32
    with jax.enable_x64(dtype == "float64"):
        g = (rng.normal(size=(64, b, 3)) * 10.0 ** rng.uniform(-6, 6, (64, b, 1))).astype(dtype)
        C = np.asarray(jnp.matmul(g, g.swapaxes(-1, -2), precision="highest"))
        assert (np.linalg.eigvalsh(C) < 0).any()
        root = np.asarray(inverse_square_root(C, 0.0), float)
    floor = 4 * b * np.finfo(dtype).eps * np.linalg.norm(C.astype(float), axis=(-2, -1))
    largest = np.linalg.norm(root, 2, axis=(-2, -1))
    np.testing.assert_allclose(largest, floor**-0.5, rtol=0.05)


def test_the_root_of_zero_and_of_padding_is_finite_and_padding_stays_apart():
    C = with_spectrum(np.array([1.0, 0.5, 0.25]))
    padded = np.pad(C, [(0, 2), (0, 2)])
    root = inverse_square_root(padded, 1e-4)
    np.testing.assert_allclose(root[:3, :3], eigenvalue_root(C, 1e-4), rtol=1e-5, atol=1e-5)
    assert (root[:3, 3:] == 0).all() and np.allclose(root[3:, 3:], 100 * np.eye(2), rtol=1e-4)
    zero = inverse_square_root(jnp.zeros((4, 4)), 0.0)
    np.testing.assert_allclose(zero, np.eye(4) * np.finfo("float32").tiny ** -0.5, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_root_scales_where_squares_leave_float32(scale):
    C = spectra(8, 100)
    root = inverse_square_root(scale * C, 1e-3 * scale) * scale**0.5
    np.testing.assert_allclose(root, inverse_square_root(C, 1e-3), rtol=1e-4, atol=1e-4)


def test_a_ridge_per_block_is_its_own():
    C, ridge = spectra(5, 10), np.array([1e-3, 1e-2, 0.1, 1.0], np.float32)
    expected = eigenvalue_root(C, ridge[:, None])
    np.testing.assert_allclose(inverse_square_root(C, ridge), expected, rtol=1e-4, atol=1e-5)
