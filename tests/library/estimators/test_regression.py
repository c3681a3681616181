"""`variance` of the Gaussian likelihood: h is the Hessian of the loss that the user minimises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moments import assert_mean, draw

from sophia_optax import gauss_newton_bartlett

ROWS, INPUTS, V = 16, 3, 5
rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, INPUTS))
Y = jnp.asarray(rng.normal(size=(ROWS, V)), jnp.float32)
PARAMS = {"w": jnp.zeros((INPUTS, V))}

# The diagonal of the Hessian of Σ (y - x w)² / 2 is Σ x², whatever the labels.
SUM_OF_HALF_SQUARES = np.repeat((X**2).sum(0)[:, None], V, 1)

REDUCTIONS = {
    "mean of the sum of half squares": (1.0, ROWS, lambda f, y: optax.l2_loss(f, y).sum(-1).mean()),
    "mean of the sum of squares": (0.5, ROWS / 2, lambda f, y: ((f - y) ** 2).sum(-1).mean()),
    "mean of squares": (V / 2, ROWS * V / 2, lambda f, y: ((f - y) ** 2).mean()),
    "optax.l2_loss, mean": (V, ROWS * V, lambda f, y: optax.l2_loss(f, y).mean()),
}


def outputs(params, x):
    return x @ params["w"]


@pytest.mark.parametrize(("variance", "divisor", "loss"), REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("groups", [1, 4])
def test_the_mean_sample_is_the_exact_hessian_of_the_loss(variance, divisor, loss, groups):
    exact = SUM_OF_HALF_SQUARES / divisor
    x = jnp.asarray(X, jnp.float32)
    hessian = jax.hessian(lambda w: loss(x @ w.reshape(INPUTS, V), Y))(jnp.zeros(INPUTS * V))
    np.testing.assert_allclose(np.diag(hessian), exact.ravel(), rtol=1e-5)
    gnb = gauss_newton_bartlett(likelihood="gaussian", variance=variance, groups=groups)

    def sample(key):
        return gnb(key, PARAMS, None, logits_fn=outputs, inputs=x)

    assert_mean(draw(sample, 4000), {"w": exact}, power=0.2)


def test_a_sample_is_that_of_unit_variance_divided_by_the_variance():
    def sample(variance):
        gnb = gauss_newton_bartlett(likelihood="gaussian", variance=variance)
        return gnb(jax.random.key(0), PARAMS, None, logits_fn=outputs, inputs=X)["w"]

    np.testing.assert_allclose(sample(4.0), sample(1.0) / 4, rtol=1e-5)


@pytest.mark.parametrize("variance", [0.0, -1.0, np.inf, np.nan])
def test_a_variance_that_is_not_positive_and_finite_is_refused(variance):
    with pytest.raises(ValueError, match=r"variance=.* must be above 0 and finite"):
        gauss_newton_bartlett(likelihood="gaussian", variance=variance)


def test_other_likelihoods_have_no_variance():
    with pytest.raises(ValueError, match="belongs to likelihood='gaussian', not 'bernoulli'"):
        gauss_newton_bartlett(likelihood="bernoulli", variance=2.0)
