"""Held-out loss: how much is read, and that the host never runs ahead of the devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from train import data
from train.step.batch import Batch
from train.step.heldout import make_evaluate


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

    def heldout(batches):
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


def fixed(params, batch):
    """Logits [B, T, 256]: each token is guessed to be the one before it, e^2 to 1."""
    return 2 * jax.nn.one_hot(batch.inputs, 256)


def losses_by_hand(batch):
    wrong = np.log(255 + np.exp(2))
    return np.where(batch.targets == batch.inputs, wrong - 2, wrong)


def test_a_part_is_evenly_spaced_and_the_same_each_time():
    """Of the batches 0, ..., n - 1 the first, the last and those halfway."""
    loaded = data.load(data.DataConfig(), batch_size=64, sequence_length=64, seed=0)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    evaluate = make_evaluate(fixed, lambda: loaded, place)
    every = list(loaded.heldout())
    assert len(every) > 12
    last = len(every) - 1
    chosen = [every[0], every[round(last / 2)], every[last]]
    sums = [(losses_by_hand(b) * b.weights).sum() for b in chosen]
    want = sum(sums) / sum(b.weights.sum() for b in chosen)
    for _ in range(2):
        found = evaluate(None, batches=3)["heldout_loss"]
        np.testing.assert_allclose(found, want, rtol=1e-5)
    whole = sum((losses_by_hand(b) * b.weights).sum() for b in every)
    whole /= sum(b.weights.sum() for b in every)
    for batches in (None, len(every), 999):
        np.testing.assert_allclose(
            evaluate(None, batches=batches)["heldout_loss"], whole, rtol=1e-5
        )
    assert abs(whole - want) > 1e-4  # or the part would prove nothing


def test_it_ends_before_the_next_batch_where_it_is_told_to_stop():
    read, asked = [], iter([False, False, True])

    def heldout(batches):
        for number in range(9):
            read.append(number)
            tokens = np.zeros((8, 16), np.int32)
            yield Batch(tokens, tokens, np.ones((8, 16), np.float32))

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    evaluate = make_evaluate(fixed, lambda: SimpleNamespace(heldout=heldout), place)
    assert evaluate(None, stopped=lambda: next(asked)) is None
    assert read == [0, 1, 2]
