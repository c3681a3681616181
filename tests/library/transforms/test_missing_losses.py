"""The average loss of a trust region when some updates pass no loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from sophia_optax import soaa


def radii(losses, **arguments):
    tx, x = soaa(0.1, total_steps=10, b1=0.5, gamma=0.25, **arguments), jnp.array([1.0])
    state, found = tx.init(x), []
    for value in losses:
        extra = {} if value is None else {"value": value}
        _, state = tx.update(jnp.array([0.3]), state, x, **extra)
        found.append(float(state[0].radius))
    return found, state[0]


def test_the_letter_divides_by_every_step_and_the_default_by_the_losses_that_came():
    """After a step without a loss the two corrections differ."""
    losses = [3.0, None, None, 2.0]
    tx, x = {}, jnp.array([1.0])
    for name in ("seen", "steps"):
        tx[name] = soaa(0.1, total_steps=10, b1=0.5, loss_correction=name)
    b1, mean = 0.5, 0.5 * (0.5 * 3.0) + 0.5 * 2.0
    mass = {"seen": 0.5 * 0.5 + 0.5, "steps": 1 - b1**4}
    for name, each in tx.items():
        state = each.init(x)
        for value in losses[:-1]:
            extra = {} if value is None else {"value": value}
            _, state = each.update(jnp.array([0.3]), state, x, **extra)
        before = state[0]
        _, state = each.update(jnp.array([0.3]), state, x, value=losses[-1])
        fall = mean / mass[name] - losses[-1]
        power = 3 / 10
        low, high = (1 - 0.25) ** power, 1 + 0.25**power
        ratio = fall / max(float(before.predicted), 1e-8) * float(before.radius)
        np.testing.assert_allclose(state[0].radius, np.clip(ratio, low, high), rtol=1e-5)
    assert mass["seen"] != mass["steps"]


@pytest.mark.parametrize("rule", ["soaa", "tadam"])
def test_where_every_step_brings_a_loss_they_are_the_same(rule):
    losses = [3.0, 2.5, 2.6, 2.2]
    seen, _ = radii(losses, rule=rule)
    steps, _ = radii(losses, rule=rule, loss_correction="steps")
    np.testing.assert_allclose(seen, steps, rtol=1e-5)


def test_the_first_loss_predicts_no_fall_whichever_corrects():
    """Otherwise rounding errors divided by eps would set the first radius."""
    for name in ("seen", "steps"):
        (radius,), _ = radii([3.3], loss_correction=name)
        assert radius == radii([7.7], loss_correction=name)[0][0]


def test_another_correction_is_refused():
    with pytest.raises(ValueError, match="loss_correction='all' is unknown; choose one of seen"):
        soaa(0.1, total_steps=10, loss_correction="all")
