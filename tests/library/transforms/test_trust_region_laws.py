"""trust_region around any direction, and with losses of any kind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles as o
import pytest
from paths import SHAPES, assert_equal_paths, cast
from regions import LR, G, T, every_rule, ratio, region, scalars, updated

from sophia_optax import soaa


def total(*trees):
    """The sum over all coordinates of the product of the trees."""
    return o.total(o.tree(lambda *leaves: np.prod(leaves, axis=0), *trees))


# ---------------------------------------------------------------- the direction inside


@every_rule
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_direction_is_multiplied_by_the_radius_and_predicts_its_slope(dtype, rule):
    """The sum is taken in float32, since 12 squares of 300 overflow float16."""
    g = {n: 300 * x for n, x in G.items()}
    u, state = updated(region(optax.scale(2.0), rule=rule), g, dtype=dtype, value=3.0)
    held = cast(g, dtype)
    a = 0.0
    for n in G:
        exact = 3 * np.asarray(held[n], float)
        assert u[n].dtype == dtype
        np.testing.assert_allclose(u[n], exact, rtol=float(jnp.finfo(dtype).eps))
        a += (np.asarray(held[n], float) * exact).sum()
    predicted = LR * (a - a**2 / 2 if rule == "tadam" else a)
    np.testing.assert_allclose(state.predicted, predicted, rtol=1e-6)


NESTS = {
    "chain, masked": lambda tx: optax.chain(optax.masked(tx, dict.fromkeys(SHAPES, True))),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "partition": lambda tx: optax.partition({"ours": tx}, "ours"),
}


@pytest.mark.parametrize("nest", NESTS)
def test_a_ratio_inside_takes_the_radius_in_and_is_not_multiplied_twice(nest):
    u, state = updated(region(NESTS[nest](ratio())), value=3.0)
    g = cast(G, "float32")
    expected, said = jax.jit(ratio().update)(g, ratio().init(g), radius=1.5)
    assert_equal_paths(u, expected, "float32")
    newton = [np.abs(2 / x) < 1.2 for x in G.values()]
    assert any(x.any() for x in newton) and not all(x.all() for x in newton)
    linear, quadratic = said.predicted_reduction
    np.testing.assert_allclose(state.predicted, LR * (linear - quadratic / 2), rtol=1e-6)


@every_rule
def test_parts_that_are_all_ratios_gain_together(rule):
    """Each has its own gamma; a and b are sums over both."""
    parts = optax.partition(
        {"a": ratio(0.5), "b": ratio(5.0)}, {n: "a" if n == "matrix" else "b" for n in SHAPES}
    )
    u, state = updated(region(parts, rule=rule), value=3.0)
    exact = {}
    for n, g in G.items():
        denominator = np.maximum(1.5 * (0.5 if n == "matrix" else 5.0) * g**2, 1e-3)
        exact[n] = np.clip(1.5 * g / denominator, -1.2, 1.2)
    assert_equal_paths(u, exact, "float32")
    a, b = total(G, exact), total(G, G, exact, exact)
    bend = b + (a**2 if rule == "tadam" else 0)
    np.testing.assert_allclose(state.predicted, LR * (a - bend / 2), rtol=1e-5)


@pytest.mark.parametrize("extra", [{"hessian": None, "refresh": False}, {"obj_fn": None}])
def test_other_arguments_reach_the_direction(extra):
    told = {}

    def update(updates, state, params=None, **extra):
        told.update(extra)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = region(spy)
    tx.update({}, tx.init({})._replace(radius=jnp.asarray(1.5)), value=2.0, **extra)
    assert told == {"radius": 1.5, "value": 2.0} | extra


# ---------------------------------------------------------------- the loss


@every_rule
def test_without_a_finite_loss_radius_average_and_prediction_stay(rule):
    """The count, the momentum and the steps go on."""
    g, tx = cast(G, "float32"), region(ratio(b1=0.9), rule=rule)
    step = jax.jit(lambda state, value: tx.update(g, state, g, value=value))
    before = step(step(tx.init(g), 3.0)[1], 2.9)[1]
    assert before.radius != 1 and before.predicted != 0
    for missing in (None, np.nan, np.inf, -np.inf):
        u, after = step(before, missing)
        assert scalars(after) == scalars(before)
        assert after.count == before.count + 1 == after.inner.momentum.count == 3
        assert all(x.any() and jnp.isfinite(x).all() for x in jax.tree.leaves(u))
        last = step(after, 2.8)[1]
        assert last.radius != before.radius and last.mass > before.mass


@every_rule
def test_before_the_first_loss_the_radius_is_one(rule):
    """Its bounds at t = 1 are [1, 2], and the first loss cannot be compared with another."""
    state = region(rule=rule).init(G)
    assert scalars(state) == [1, 0, 0, 0]
    for value in (np.nan, -5.0):
        _, state = updated(region(rule=rule), state=state, radius=None, value=value)
        assert state.radius == (1.0 if np.isnan(value) or rule == "tadam" else 0.75 ** (1 / T))


@pytest.mark.parametrize("value", [np.ones(1), np.ones((2, 1)), optax.MaskedNode()], ids=repr)
def test_a_loss_that_is_no_scalar_is_refused_with_the_cure(value):
    with pytest.raises(TypeError, match="must be the scalar loss of this step"):
        updated(region(), value=value)


def test_a_loss_masked_with_a_single_array_is_refused_with_the_cure():
    tx = optax.partition(
        {"ours": region(), "other": optax.identity()}, "other", mask_compatible_extra_args=True
    )
    x = jnp.ones(3)
    with pytest.raises(TypeError, match="wrap params in a dict"):
        tx.update(x, tx.init(x), x, value=jnp.asarray(1.0))


@pytest.mark.parametrize("value", [2, 2.0, np.float64(2), jnp.asarray(2.0, jnp.bfloat16)])
def test_a_loss_of_any_dtype_is_taken(value):
    _, state = updated(region(), value=value)
    np.testing.assert_allclose(scalars(state)[1], 0.2, rtol=1e-6)


# ---------------------------------------------------------------- the radius

GAMMA = 0.25


def told(rule, ratios, b1=0.9):
    """The radii along losses chosen so that actual / predicted reduction equals these ratios."""
    tx, state = region(rule=rule, b1=b1, gamma=GAMMA), None
    with jax.enable_x64(True):
        g, radii, mean, mass = jnp.full(2, 0.5), [], 0.0, 0.0
        state = tx.init(g)
        for ratio in (None, *ratios):
            # tadam: l̂ before - value; soaa: l̂ with the value in it, less the value
            share = 1.0 if rule == "tadam" or not mass else b1 * mass / (b1 * mass + 1 - b1)
            gap = 0.0 if ratio is None else ratio * float(state.predicted) / share
            value = mean / mass - gap if mass else 3.0
            mean, mass = b1 * mean + (1 - b1) * value, b1 * mass + (1 - b1)
            _, state = tx.update(g, state, value=value)
            radii.append(float(state.radius))
    return np.array(radii)


def bounds(count):
    power = np.arange(count) / T
    return (1 - GAMMA) ** power, 1 + GAMMA**power


def test_soaa_multiplies_the_radius_by_actual_over_predicted():
    ratios = [1.5, 1.1, 0.8, 0.9, 1.0, 1.2]
    np.testing.assert_allclose(told("soaa", ratios), np.cumprod([1, *ratios]), rtol=1e-9)


def test_tadam_changes_the_radius_outside_of_gamma_and_one_minus_gamma():
    ratios = [0.76, 0.74, 0.26, 0.24, 0.5, -3.0, 0.74, 5.0]
    low, high = bounds(len(ratios) + 1)
    expected = [1.0]
    for t, x in enumerate(ratios, start=1):
        factor = low[t] if x < 0.25 else high[t] if x > 0.75 else 1
        expected.append(np.clip(factor * expected[-1], low[t], high[t]))
    np.testing.assert_allclose(told("tadam", ratios), expected, rtol=1e-9)
    assert (np.diff(expected) > 0).any() and (np.diff(expected) < 0).any()


@every_rule
def test_the_radius_stays_within_bounds_that_move_at_every_update(rule):
    up, down = (told(rule, [x] * 30) for x in (9.0, -9.0))
    low, high = bounds(31)
    np.testing.assert_allclose(up[1:], high[1:], rtol=1e-9)
    np.testing.assert_allclose(down[1:], low[1:], rtol=1e-9)
    assert (np.diff(low) < 0).all() and (np.diff(high) < 0).all()


@pytest.mark.parametrize("loss", [3.14, 10.9, 1e4])
def test_the_first_loss_leaves_the_radius_at_one_whatever_rounding_does(loss):
    tx = soaa(0.1, 100)
    g = cast(G, "float32")
    _, state = jax.jit(lambda s, v: tx.update(g, s, g, value=v))(tx.init(g), loss)
    assert state[0].radius == 1
