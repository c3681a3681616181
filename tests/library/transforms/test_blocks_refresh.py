"""When `scale_by_blocks` takes roots, and which program that leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_optax import scale_by_blocks

rng = np.random.default_rng(0)


def program(refresh, update_interval=10, **extra):
    tx, g = scale_by_blocks(update_interval=update_interval), {"w": jnp.ones((4, 6))}
    return str(jax.make_jaxpr(lambda s: tx.update(g, s, refresh=refresh, **extra))(tx.init(g)))


def test_renew_decides_before_refresh():
    assert program(False, renew=True) == program(True)
    assert program(True, renew=False) == program(False)


@pytest.mark.parametrize("boolean", [bool, np.bool_])
def test_a_static_refresh_leaves_one_branch_in_the_program(boolean):
    plain, refresh = program(boolean(False)), program(boolean(True))
    assert "cond[" not in plain + refresh
    assert "scan[" not in plain and "while[" not in plain, "no Newton iteration"
    assert "scan[" in refresh or "while[" in refresh
    for dynamic in (program(None), program(jnp.asarray(True))):
        assert "cond[" in dynamic
    assert "cond[" not in program(None, 1)


def test_every_product_asks_for_full_precision():
    """GPUs would round operands to 10 bits, which a CPU test cannot see."""
    text = program(True)
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHE")


def test_before_the_first_root_momentum_is_normalised_block_by_block():
    g, tx = (
        jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
        scale_by_blocks(rms=None, update_interval=2),
    )
    updates = jax.jit(lambda g: tx.update(g, tx.init(g), refresh=False)[0])(g)
    np.testing.assert_allclose(updates, g / jnp.linalg.norm(g @ g.T / 6) ** 0.5, rtol=1e-4)


def test_a_refresh_that_is_no_bool_is_refused():
    with pytest.raises(TypeError, match="`refresh` must be None, a bool"):
        program(1)
