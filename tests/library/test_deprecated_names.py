"""Deprecated names give the results of the names that replaced them."""

import jax
import jax.numpy as jnp
import pytest
from contract import EXACT, assert_close

from sophia_optax import ema, first_moment, orthosoph, scale_by_blocks

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2)}


def two_updates(tx):
    """The step and the state of the second update."""
    grads = jax.tree.map(lambda x: x + 1, PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    return tx.update(PARAMS, state, PARAMS)


def test_first_moment_is_ema_and_its_warning_names_the_new_call():
    cure = r"Call `sophia_optax\.ema\(0\.9, debias=False, accumulator_dtype='bfloat16'\)` instead"
    with pytest.warns(DeprecationWarning, match=cure):
        old = first_moment(0.9, bias_correction=False, dtype="bfloat16")
    new = ema(0.9, debias=False, accumulator_dtype="bfloat16")
    assert_close(two_updates(old), two_updates(new), **EXACT)


@pytest.mark.parametrize("factory", [lambda **kw: orthosoph(0.1, **kw), scale_by_blocks])
def test_b2_numbers_is_b2_vector(factory):
    with pytest.warns(DeprecationWarning, match="is now `b2_vector`"):
        old = two_updates(factory(b2_numbers=0.5))
    new, default = (two_updates(factory(**x)) for x in ({"b2_vector": 0.5}, {}))
    assert_close(old, new, **EXACT)
    assert not jnp.allclose(default[0]["b"], new[0]["b"])
