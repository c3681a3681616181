"""Held-out loss: the host never runs ahead of the devices, where XLA on CPU can lock up."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from train.batch import Batch
from train.evaluate import make_evaluate


def slow(params, batch):
    """Logits of a model that knows nothing of four words, and takes milliseconds to say so."""
    nothing = jax.lax.fori_loop(0, 10_000, lambda _, x: jnp.sin(x), params)
    return jnp.zeros((*batch.targets.shape, 4)) + nothing


def test_one_batch_is_on_its_way_while_the_next_is_read(monkeypatch):
    made, late, jit = [], [], jax.jit

    def noted(function):
        compiled = jit(function)

        def call(*args):
            made.append(compiled(*args))
            return made[-1]

        return call

    def heldout():
        tokens = np.zeros((8, 100), np.int32)
        for _ in range(10):
            late.append(sum(not x.is_ready() for x in made))
            yield Batch(tokens, tokens, np.ones((8, 100), np.float32))

    data = SimpleNamespace(heldout=heldout, bytes_per_token=2.0)
    monkeypatch.setattr(jax, "jit", noted)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = make_evaluate(slow, lambda: data, place)(jnp.zeros(100 * 4).reshape(100, 4))
    np.testing.assert_allclose(found["bits_per_byte"], 1, rtol=1e-6)
    assert len(made) == 10
    assert max(late) <= 1
