"""Labels drawn from a softmax: two uniform numbers each, and the right frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import softmax
from moments import flops, jit

from sophia_optax import gauss_newton_bartlett
from sophia_optax.estimators.likelihood import sample_categorical

DRAWS = 2**18


def counts(logits, key=0):
    """How often each class was drawn."""

    @jit
    def count(keys, logits):
        rows = jnp.broadcast_to(logits, (DRAWS // 16, len(logits)))
        labels = jax.lax.map(lambda key: sample_categorical(key, rows), keys)
        return jnp.bincount(labels.ravel(), length=len(logits) + 1)

    return np.asarray(count(jax.random.split(jax.random.key(key), 16), jnp.asarray(logits)))


@pytest.mark.parametrize("classes", [3, 128, 300])  # blocks of 128: a part, one, two and a part
def test_frequencies_are_those_of_the_softmax_for_rare_classes_too(classes):
    """The chi-square is within 5 standard deviations of its mean; rare classes are pooled."""
    logits = 3 * np.random.default_rng(classes).normal(size=classes)
    logits[1] = -np.inf
    drawn, expected = counts(np.float32(logits)), DRAWS * softmax(logits)
    drawn, beyond = drawn[:-1], drawn[-1]
    assert beyond == 0 and drawn[1] == 0
    common = expected > 20
    chi_square = np.sum(np.square(drawn - expected)[common] / expected[common])
    assert chi_square < common.sum() + 5 * np.sqrt(2 * common.sum())
    rare = expected[~common].sum()
    assert abs(drawn[~common].sum() - rare) <= 5 * np.sqrt(rare)
    assert classes < 300 or 100 < rare < 0.01 * DRAWS


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_the_scale_of_logits_does_not_matter(dtype, shift):
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray([0.0, 1.0, -jnp.inf, 2.0], dtype) * jnp.ones((64, 1), dtype)
        labels = sample_categorical(jax.random.key(0), logits)
        np.testing.assert_array_equal(sample_categorical(jax.random.key(0), logits + shift), labels)
        assert labels.shape == (64,) and set(np.unique(labels)) == {0, 1, 3}


def test_one_class_alone_is_certain():
    for classes, label in ((300, 299), (300, 0), (129, 128), (1, 0)):
        logits = jnp.full((50, classes), -jnp.inf).at[:, label].set(-3.0)
        assert np.all(sample_categorical(jax.random.key(0), logits) == label)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_logits_that_are_not_finite_give_no_finite_sample(value):
    x = jnp.ones((4, 2)).at[2, 1].set(value)
    for groups in (1, 4):
        gnb = gauss_newton_bartlett(groups=groups)
        extra = {"logits_fn": lambda w, x: x @ w, "inputs": x}
        h = jit(lambda w: gnb(jax.random.key(0), w, None, **extra))(jnp.ones((2, 3)))  # noqa: B023
        assert not np.isfinite(h).any(1)[1]


def test_a_label_costs_a_pass_over_the_logits():
    """`jax.random.categorical` draws a Gumbel number for each class, most of a sample's cost."""
    logits = jax.ShapeDtypeStruct((8, 50304), jnp.float32)
    ours = flops(lambda f: sample_categorical(jax.random.key(0), f), logits) / logits.size
    theirs = flops(lambda f: jax.random.categorical(jax.random.key(0), f), logits) / logits.size
    print(f"{ours:.1f} operations a logit, with Gumbel numbers {theirs:.1f}")
    assert ours < 8 < 40 < theirs
