"""Tolerances from standard errors: a failure then means bias, not bad luck."""

import functools

import jax
import numpy as np

# Small tests spend most of their time in LLVM; unoptimised programs compile three times faster.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(estimate, number, seed=0):
    """`number` samples of `estimate(key)`, drawn side by side, as NumPy float64."""
    keys = jax.random.split(jax.random.key(seed), number)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jit(jax.vmap(estimate))(keys))


def standard_error(samples):
    return samples.std(axis=0, ddof=1) / np.sqrt(len(samples))


def assert_mean(samples, exact, power):
    """Every coordinate's mean is within 5 standard errors of `exact`.

    The test must also be sensitive: half of the coordinates would reveal a bias of `power` times
    the exact value.
    """
    for name, want in exact.items():
        se = standard_error(samples[name])
        excess = np.abs(samples[name].mean(0) - want) - 1e-5 * np.abs(want)  # float32 samples
        assert np.all(excess <= 5 * se), f"{name}: {np.max(excess / se):.1f} standard errors off"
        assert np.median(5 * se / np.abs(want)) < power, f"{name}: too few samples"


def flops(function, *shapes):
    """XLA's count of floating-point operations for one call; the body of a scan counts once."""
    return jit(function).lower(*shapes).compile().cost_analysis()["flops"]
