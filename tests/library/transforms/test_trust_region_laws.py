"""trust_region around any direction, inside any wrapper, and with losses of any kind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles as o
import pytest
from paths import GRADS, PARAMS, SHAPES, STEPS, assert_equal_paths, cast, ours, row, theirs

from sophia_optax import (
    clip_by_ratio,
    floor,
    hessian_estimate,
    soaa,
    squared_gradient,
    trust_region,
)

T, LR = 40, 0.1
G = row(GRADS, 0)
RULES = ("soaa", "tadam")
every_rule = pytest.mark.parametrize("rule", RULES)
LOSSES = 3 - 0.01 * np.arange(STEPS) + 0.15 * np.random.default_rng(7).normal(size=STEPS)


def region(direction=None, learning_rate=LR, total_steps=T, **arguments):
    direction = optax.identity() if direction is None else direction
    return trust_region(direction, learning_rate, total_steps=total_steps, **arguments)


def ratio(gamma=0.5, b1=0.0, decay=0.0, debias=True):
    """By default m is the gradient and h its square."""
    return clip_by_ratio(
        optax.ema(b1, debias=debias, accumulator_dtype=None),
        hessian_estimate(squared_gradient(), decay=decay, update_interval=1),
        denominator=floor(gamma, 1e-3),
        clip_threshold=0.8,
    )


def updated(tx, g=G, radius=1.5, state=None, dtype="float32", **extra):
    """One update, compiled, at this radius."""
    g = cast(g, dtype)
    state = tx.init(g) if state is None else state
    if radius is not None:
        state = optax.tree.set(state, radius=jnp.full_like(optax.tree.get(state, "radius"), radius))
    return jax.jit(lambda g, state: tx.update(g, state, g, **extra))(g, state)


def scalars(state):
    return [float(getattr(state, n)) for n in ("radius", "loss", "mass", "predicted")]


def total(*trees):
    """The sum over every coordinate of the product of the trees there."""
    return o.total(o.tree(lambda *leaves: np.prod(leaves, axis=0), *trees))


# ---------------------------------------------------------------- the direction inside


@every_rule
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_direction_is_multiplied_by_the_radius_and_predicts_its_slope(dtype, rule):
    """Summed in float32: 12 squares of 300 are beyond float16."""
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


# ---------------------------------------------------------------- wrappers around it


def adam_region(**arguments):
    return region(optax.scale_by_adam(b2=0.9), **arguments)


def descent(tx):
    return optax.chain(tx, optax.scale_by_learning_rate(LR))


def radius_of(state):
    return {"radius": optax.tree.get(state, "radius")}


def assert_path(tx, oracle, grads=GRADS, dtype="float64", names=SHAPES, value=LOSSES):
    expected = theirs(oracle, grads, watch=lambda o: {"radius": o.dt}, value=value)
    expected = {n: expected[n] for n in (*names, "radius")}
    with jax.enable_x64(dtype == "float64"):
        path, _ = ours(tx, dtype, watch=radius_of, value=value)
        assert_equal_paths(path, expected, dtype, rtol={"float64": 1e-10, "float32": 3e-5}[dtype])


def adam_oracle(rule="soaa"):
    return o.TrustRegion(o.Adam(0, b2=0.9), LR, total_steps=T, rule=rule)


def test_behind_a_global_clip_the_region_sees_the_clipped_gradient():
    def clipped(t):
        g = row(GRADS, t)
        return o.tree(lambda x: x / max(1.0, o.global_norm(g)), g)

    rows = [clipped(t) for t in range(STEPS)]
    grads = {n: np.stack([g[n] for g in rows]) for n in SHAPES}
    tx = optax.chain(optax.clip_by_global_norm(1.0), adam_region(), optax.scale(-LR))
    assert_path(tx, adam_oracle(), grads)


def test_behind_a_mask_the_sums_are_those_of_its_part():
    """The rest of the tree passes by, as if its gradient were zero."""
    mask = {n: n == "matrix" for n in SHAPES}
    grads = {n: g if n == "matrix" else 0 * g for n, g in GRADS.items()}
    tx = optax.chain(optax.masked(adam_region(), mask), optax.scale_by_learning_rate(LR))
    assert_path(tx, adam_oracle(), grads, names=["matrix"])


def test_regions_in_a_partition_have_radii_of_their_own():
    labels = {n: n if n == "matrix" else "rest" for n in SHAPES}
    tx = descent(optax.partition({"matrix": adam_region(), "rest": adam_region()}, labels))
    with jax.enable_x64(True):
        path, state = ours(tx, "float64", value=LOSSES)
    for part, inside in state[0].inner_states.items():
        grads = {n: g if labels[n] == part else 0 * g for n, g in GRADS.items()}
        oracle = adam_oracle()
        expected = theirs(oracle, grads, value=LOSSES)
        names = [n for n in SHAPES if labels[n] == part]
        assert_equal_paths(path, {n: expected[n] for n in names}, "float64", rtol=1e-10)
        np.testing.assert_allclose(optax.tree.get(inside, "radius"), oracle.dt, rtol=1e-10)


@every_rule
def test_multi_steps_moves_on_the_last_micro_step_by_its_loss(rule):
    """Micro-batches differ; their mean gradient is the batch's, their mean loss is the caller's."""
    tx = optax.MultiSteps(descent(adam_region(rule=rule)), every_k_schedule=2)
    params, oracle, expected = cast(PARAMS, "float32"), adam_oracle(rule), PARAMS
    state, step = tx.init(params), jax.jit(tx.update)
    for t in range(8):
        expected = oracle.step(expected, row(GRADS, t), value=LOSSES[t])
        for share, value in ((0.5, 100.0), (1.5, LOSSES[t])):
            g = cast(o.tree(lambda x: share * x, row(GRADS, t)), "float32")  # noqa: B023
            updates, state = step(g, state, params, value=jnp.asarray(value))
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(optax.tree.get(state, "radius"), oracle.dt, rtol=1e-5)
    assert_equal_paths(params, expected, "float32", rtol=1e-4)


@every_rule
def test_injected_schedules_of_every_number_are_the_numbers(rule):
    numbers = {"learning_rate": 0.1, "total_steps": T, "b1": 0.8, "b2": 0.95}
    numbers |= {"gamma": 0.4, "eps": 1e-3, "weight_decay": 0.3}
    factory = optax.inject_hyperparams(
        soaa, static_args=("rule", "weight_decay_mask"), hyperparam_dtype=jnp.float32
    )
    tx = factory(**{n: lambda _, x=x: x for n, x in numbers.items()}, rule=rule)
    oracle = {"soaa": o.SOAA, "tadam": o.Tadam}[rule](**numbers)
    assert_path(tx, oracle, dtype="float32")


# ---------------------------------------------------------------- the loss


@every_rule
def test_without_a_finite_loss_radius_average_and_prediction_stay(rule):
    """Time, momentum and steps go on."""
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
    """Its bounds at t = 1 are [1, 2]; a loss has nothing to be compared with."""
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
    """The radii along losses that realise these ratios of actual to predicted reduction."""
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
    for t, ratio in enumerate(ratios, start=1):
        factor = low[t] if ratio < 0.25 else high[t] if ratio > 0.75 else 1
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


# ---------------------------------------------------------------- dtypes and edges


@every_rule
@pytest.mark.parametrize(
    ("dtype", "held"),
    [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_scalars_are_float32_or_float64_where_a_parameter_is(dtype, held, rule):
    with jax.enable_x64(True):
        tx = region(ratio(), learning_rate=lambda t: LR / (t + 1), rule=rule)
        g, value = cast(G, dtype), jnp.asarray(3.0, "float64")
        state = jax.eval_shape(tx.init, g)
        u, after = jax.eval_shape(lambda g, s: tx.update(g, s, value=value), g, state)
        for s in (state, after):
            names = ("radius", "loss", "mass", "predicted")
            assert {getattr(s, n).dtype.name for n in names} == {held}
            assert s.count.dtype == "int32"
        assert {x.dtype.name for x in jax.tree.leaves(u)} == {dtype}


@pytest.mark.parametrize(("rule", "moments"), [("soaa", 1), ("tadam", 2)])
def test_soaa_keeps_momentum_and_one_moment_and_its_parent_one_more(rule, moments):
    for mu, nu in ((None, None), ("bfloat16", "float32"), ("float32", "bfloat16")):
        tx = soaa(LR, T, rule=rule, mu_dtype=mu, hessian_dtype=nu)
        g = cast(G, "float32")
        state = jax.eval_shape(tx.init, g)
        u, state = jax.eval_shape(lambda g, s, tx=tx: tx.update(g, s, g, value=3.0), g, state)
        held = sorted(x.dtype.name for x in jax.tree.leaves(state) if x.shape == (3, 4))
        assert held == sorted([mu or "float32", *[nu or "float32"] * moments])
        assert u["matrix"].dtype == "float32"
        numbers = [x for x in jax.tree.leaves(state) if x.shape == ()]
        assert sum(x.dtype.itemsize for x in numbers) < 150


@every_rule
def test_every_scalar_has_a_buffer_of_its_own_and_may_be_donated(rule):
    g = cast(G, "float32")
    tx = soaa(LR, T, rule=rule)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    for init in (tx.init, jax.jit(tx.init)):
        state = init(g)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
        for _ in range(2):
            _, state = step(jax.tree.map(jnp.copy, g), state, g, value=jnp.asarray(2.0))
        assert state[0].count == 2


ZEROS = {n: np.zeros(s) for n, s in SHAPES.items()}


@every_rule
@pytest.mark.parametrize("g", [ZEROS, {}], ids=["zeros", "empty"])
def test_without_any_gradient_all_stays_finite(g, rule):
    for tx in (soaa(LR, T, rule=rule), region(optax.scale_by_adam(), rule=rule)):
        params = cast(g, "float32")
        state, step = tx.init(params), jax.jit(tx.update)
        for value in (3.0, 3.0, 2.0):
            u, state = step(params, state, params, value=value)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((u, state)))
        assert not any(x.any() for x in jax.tree.leaves(u))


@every_rule
def test_gradients_that_are_not_finite_leave_the_scalars_finite(rule):
    tx = region(optax.scale_by_adam(), rule=rule)
    _, state = updated(tx, radius=None, value=3.0)
    bad = G | {"matrix": np.full(SHAPES["matrix"], np.nan)}
    _, after = updated(tx, bad, state=state, radius=None, value=2.9)
    assert np.isfinite(scalars(after)).all() and after.predicted == state.predicted
    assert after.mass > state.mass


def test_our_own_arithmetic_needs_no_implicit_promotion():
    """Without bias correction of m, which is optax's and does."""
    g = {"a": jnp.ones((), jnp.bfloat16), "b": jnp.ones(3)}
    with jax.numpy_dtype_promotion("strict"):
        for rule in RULES:
            for direction in (optax.scale(2.0), ratio(debias=False)):
                tx = region(direction, rule=rule)
                jax.eval_shape(lambda s, v, tx=tx: tx.update(g, s, value=v), tx.init(g), 2.0)


@pytest.mark.parametrize("factory", [region, lambda **kw: soaa(LR, **({"total_steps": T} | kw))])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "tadan"}, "rule='tadan' is unknown; choose one of soaa, tadam"),
        ({"b1": 1.0}, r"b1=1.0 is outside \[0, 1\)"),
        ({"gamma": 1.5}, r"gamma=1.5 is outside \[0, 1"),
        ({"eps": -1e-8}, "eps=-1e-08 is outside"),
        ({"total_steps": 0}, "total_steps=0 must be an integer of at least 1"),
        ({"total_steps": 1.5}, "total_steps=1.5 must be an integer"),
    ],
)
def test_arguments_out_of_range_are_named(factory, arguments, message):
    with pytest.raises(ValueError, match=message):
        factory(**arguments)


@pytest.mark.parametrize(
    "factory",
    [
        lambda **kw: trust_region(optax.identity(), 0.1, total_steps=9, **kw),
        lambda **kw: soaa(0.1, 9, **kw),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"eps": 0.0}, "eps=0"), ({"gamma": 1.0}, r"gamma=1.0 is outside \[0, 1\)")],
)
def test_numbers_that_make_the_radius_nan_or_zero_for_good_are_refused(factory, arguments, message):
    for rule in ("soaa", "tadam"):
        with pytest.raises(ValueError, match=message):
            factory(rule=rule, **arguments)


@pytest.mark.parametrize("loss", [3.14, 10.9, 1e4])
def test_the_first_loss_leaves_the_radius_at_one_whatever_rounding_does(loss):
    tx = soaa(0.1, 100)
    g = cast(G, "float32")
    _, state = jax.jit(lambda s, v: tx.update(g, s, g, value=v))(tx.init(g), loss)
    assert state[0].radius == 1
