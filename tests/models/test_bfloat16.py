"""bfloat16 changes how a decoder is computed, and not its parameters."""

import dataclasses
import re

import jax
import jax.numpy as jnp
from test_decoder import CONFIG, jitted, loss_of, tokens_of

from models import split

BFLOAT16 = dataclasses.replace(CONFIG, dtype="bfloat16")


def bfloat16_logits_and_gradient():
    """In standard promotion: jax.nn.dot_product_attention mixes dtypes in bfloat16."""
    params, tokens = jitted(CONFIG).init(jax.random.key(0)), tokens_of(CONFIG)
    with jax.numpy_dtype_promotion("standard"):
        logits = jitted(BFLOAT16).apply(params, tokens)
        return logits, jax.jit(jax.grad(loss_of(BFLOAT16, tokens)))(params)


def test_bfloat16_compute_is_near_float32_and_returns_float32():
    params, tokens = jitted(CONFIG).init(jax.random.key(0)), tokens_of(CONFIG)
    exact = jitted(CONFIG).apply(params, tokens)
    exact_gradient = jax.jit(jax.grad(loss_of(CONFIG, tokens)))(params)
    logits, gradient = bfloat16_logits_and_gradient()
    assert logits.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(logits - exact).max() / jnp.abs(exact).max()) < 0.03
    assert float((logits == logits.astype(jnp.bfloat16).astype(jnp.float32)).mean()) < 0.1
    for one, other in zip(*map(jax.tree.leaves, (gradient, exact_gradient)), strict=True):
        assert one.dtype == jnp.float32
        assert float(jnp.linalg.norm(one - other)) < 0.05 * float(jnp.linalg.norm(other))


def test_bfloat16_backward_multiplies_in_bfloat16():
    params = jitted(CONFIG).init(jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(jax.grad(loss_of(BFLOAT16, tokens_of(CONFIG)))).lower(params)
    lines = lowered.as_text().splitlines()
    operands = [re.search(r"stablehlo.dot_general .* : \((.*)\) ->", line) for line in lines]
    mixed = [m.string for m in operands if m and "xf32>" in m[1]]
    assert mixed and all("lhs_precision_type = bf16" in line for line in mixed)


def test_params_do_not_depend_on_the_arithmetic():
    model = split(CONFIG)
    other = split(dataclasses.replace(CONFIG, dtype="bfloat16", attention="cudnn"))
    assert model.specs == other.specs
    assert jax.eval_shape(model.init, jax.random.key(0)) == jax.eval_shape(
        other.init, jax.random.key(0)
    )
