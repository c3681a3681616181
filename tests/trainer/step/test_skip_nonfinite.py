"""A step whose loss or gradient is not finite changes nothing, and costs what it did."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_optax
from train.step import skip_nonfinite

SIZE = 1 << 20


def plain(tx):
    def update(old, grads):
        updates, state = tx.update(grads, old[1], old[0], refresh=False)
        return optax.apply_updates(old[0], updates), state

    return update


def guarded(tx):
    def step(old, grads, loss):
        return skip_nonfinite.if_finite(plain(tx), old, grads, loss, optax.tree.norm(grads))

    return step


def start(tx, size=64):
    params = {"a": jnp.linspace(-1, 1, size), "b": jnp.array([-0.0, 2.0])}
    return params, tx.init(params)


@pytest.mark.parametrize("loss", [1.0, np.nan, np.inf])
@pytest.mark.parametrize("bad", [None, np.nan, -np.inf])
def test_what_is_not_finite_leaves_every_bit_as_it_was(loss, bad):
    tx = optax.with_extra_args_support(optax.adamw(0.1))
    old = start(tx)
    grads = jax.tree.map(jnp.ones_like, old[0])
    if bad is not None:
        grads["a"] = grads["a"].at[7].set(bad)
    new, skipped = jax.jit(guarded(tx))(old, grads, loss)
    sound = bad is None and loss == 1.0
    want = jax.jit(plain(tx))(old, grads) if sound else old
    assert skipped == (not sound)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_state_can_be_donated_and_the_update_costs_no_more_memory():
    """Bytes that XLA counts: the same but for the norm of the gradient, 4 a parameter."""
    tx = optax.with_extra_args_support(sophia_optax.sophia_g(1e-3, gamma=0.05, weight_decay=0.1))
    old = jax.eval_shape(lambda: start(tx, SIZE))
    grads, loss = old[0], jax.ShapeDtypeStruct((), jnp.float32)
    alone = jax.jit(plain(tx), donate_argnums=0).lower(old, grads).compile()
    whole = jax.jit(guarded(tx), donate_argnums=0).lower(old, grads, loss).compile()
    moved = [c.cost_analysis()["bytes accessed"] / SIZE for c in (alone, whole)]
    assert moved[1] <= moved[0] + 4.1, moved
    memory = whole.memory_analysis()
    assert memory.alias_size_in_bytes >= 12 * SIZE  # parameters, momentum, curvature
    assert memory.temp_size_in_bytes < 0.1 * SIZE
