"""soaa, trust_region and the max form, step by step, against NumPy float64 oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles as o
import pytest
from paths import (
    GRADS,
    MASK,
    REJECTED,
    SAMPLES,
    STEPS,
    assert_equal_paths,
    cast,
    given_sample,
    oracle_arguments,
    ours,
    schedule,
    theirs,
)

from models import DecoderConfig, split
from sophia_optax import (
    clip_by_ratio,
    floor,
    hessian_estimate,
    rms_floor,
    second_moment,
    shift,
    soaa,
    trust_region,
)

T = 40
ORACLES = {"soaa": o.SOAA, "tadam": o.Tadam}
rng = np.random.default_rng(7)
LOSSES = 3 - 0.01 * np.arange(STEPS) + 0.15 * rng.normal(size=STEPS)
MISSING = LOSSES.copy()
MISSING[[0, 9, 15, 16]] = np.nan, np.inf, -np.inf, np.nan
MISSING[24:29] += 1

# ---------------------------------------------------------------- ours, and the oracle's


def soaa_pair(rule, **arguments):
    arguments = {"learning_rate": 0.1, "total_steps": T} | arguments
    return soaa(**arguments, rule=rule), ORACLES[rule](**oracle_arguments(arguments))


def ratio(b1, b2, k, debias, **arguments):
    return clip_by_ratio(
        optax.ema(b1, debias=debias, accumulator_dtype=None),
        hessian_estimate(given_sample, decay=b2, update_interval=k, bias_correction=debias),
        **arguments,
    )


def sophia_pair(b1=0.965, b2=0.99, gamma=0.05, eps=1e-12, k=10, debias=True, clip=1.0):
    direction = ratio(b1, b2, k, debias, denominator=floor(gamma, eps), clip_threshold=clip)
    how = {"debias_momentum": debias, "debias_hessian": debias}
    oracle = o.Sophia(
        0, b1=b1, b2=b2, gamma=gamma, eps=eps, update_interval=k, clip_threshold=clip, **how
    )
    return direction, oracle


def lite_pair(b1=0.9, b2=0.95, eps=1e-8, clip=1.0):
    direction = ratio(b1, b2, 1, True, denominator=shift(eps), clip_threshold=clip)
    how = {"debias_momentum": True, "debias_hessian": True, "update_interval": 1}
    return direction, o.SophiaLite(0, b1=b1, b2=b2, eps=eps, gamma=clip, **how)


def max_pair(b1=0.9, b2=0.99, gamma=0.05, eps=1e-8, k=10, clip=1.0, b2v=0.999):
    direction = ratio(
        b1,
        b2,
        k,
        True,
        denominator=rms_floor(gamma, eps),
        second_moment=second_moment(b2v),
        clip_threshold=clip,
    )
    oracle = o.MaxForm(
        0, b1=b1, b2=b2, gamma=gamma, eps=eps, update_interval=k, clip_threshold=clip, b2v=b2v
    )
    return direction, oracle


def adam_pair(**arguments):
    return optax.scale_by_adam(**arguments), o.Adam(0, **arguments)


def descending(direction, learning_rate=0.1, weight_decay=0.0, weight_decay_mask=None):
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def region_pair(pair, region=(), descent=(), **arguments):
    """A direction inside a trust region; decay and learning rate come after it."""
    direction, oracle = pair(**arguments)
    region, descent = {"total_steps": T} | dict(region), {"learning_rate": 0.1} | dict(descent)
    inside = trust_region(direction, descent["learning_rate"], **region)
    return descending(inside, **descent), o.TrustRegion(
        oracle, **region, **oracle_arguments(descent)
    )


def bare_pair(pair, descent=(), **arguments):
    """The direction alone."""
    direction, oracle = pair(**arguments)
    descent = {"learning_rate": 0.1} | dict(descent)
    for name, value in oracle_arguments(descent).items():
        setattr(oracle, name, value)
    return descending(direction, **descent), oracle


OTHERS = {"b1": 0.8, "b2": 0.95, "gamma": 0.4, "eps": 1e-3, "learning_rate": schedule} | MASK
LITTLE = {"k": 3, "b1": 0.9, "b2": 0.8, "gamma": 0.5, "eps": 0.05}
TADAM = {"rule": "tadam"}
LATE = {"rule": "tadam", "gamma": 0.4, "b1": 0.8, "eps": 1e-3}
SLOW, SLOWER = {"learning_rate": 0.03}, {"learning_rate": 2e-4}
DECAY = MASK | {"learning_rate": schedule}

# What is given at every step.
SEEN = {"value": LOSSES}
MAGNITUDES = SEEN | {"sample": {n: np.abs(g) for n, g in GRADS.items()}}
SAMPLED = SEEN | {"sample": SAMPLES}
SQUARES = SEEN | {"sample": {n: s**2 for n, s in SAMPLES.items()}}
LITTLE_SQUARES = SEEN | {"sample": {n: (0.1 * s) ** 2 for n, s in SAMPLES.items()}}
AT_TIMES = SAMPLED | {"refresh": np.isin(np.arange(STEPS), (2, 3, 7, 15, 30))}
SPOILED = {"value": MISSING, "sample": REJECTED}


def scaled(factor, given=SEEN):
    return given | {"grads": {n: factor * g for n, g in GRADS.items()}}


UNEQUAL = SEEN | {"grads": GRADS | {"matrix": 0.05 * GRADS["matrix"]}}


printed, parent = (functools.partial(soaa_pair, rule) for rule in ORACLES)
sophia, lite, adam, largest = (
    functools.partial(region_pair, pair) for pair in (sophia_pair, lite_pair, adam_pair, max_pair)
)
alone = functools.partial(bare_pair, max_pair)
CASES = {
    "soaa": (printed, UNEQUAL),
    "soaa, others": (lambda: printed(**OTHERS), scaled(2.0)),
    "soaa, small gradients": (lambda: printed(learning_rate=0.5), scaled(0.01)),
    "soaa, large gradients": (printed, scaled(30.0)),
    "soaa, losses missing": (printed, {"value": MISSING}),
    "soaa, no losses": (printed, {"value": None}),
    "tadam": (parent, UNEQUAL),
    "tadam, others": (lambda: parent(**OTHERS), scaled(2.0)),
    "tadam, small gradients": (parent, scaled(0.01)),
    "tadam, losses missing": (parent, {"value": MISSING}),
    "sophia": (sophia, SAMPLED),
    "sophia, as printed": (lambda: sophia((), SLOW, debias=False, **LITTLE), SAMPLED),
    "sophia, tadam": (lambda: sophia(LATE, DECAY, clip=0.3, **LITTLE), scaled(0.1, SAMPLED)),
    "sophia, no clip": (lambda: sophia((), SLOWER, clip=None, **LITTLE), AT_TIMES),
    "sophia, missing": (lambda: sophia((), SLOW, **LITTLE), SPOILED),
    "lite": (lite, MAGNITUDES),
    "adam": (lambda: adam((), SLOW), SEEN),
    "adam, tadam": (lambda: adam(TADAM, DECAY), scaled(0.02)),
    "adam, missing": (lambda: adam(LATE, b1=0.8, b2=0.9), scaled(0.02, {"value": MISSING})),
    "max form": (alone, SQUARES),
    "max form, no clip": (lambda: alone(DECAY, clip=None, **LITTLE), SQUARES),
    "max form, clip": (lambda: alone(clip=0.2, b2v=0.9, **LITTLE), SAMPLED),
    "max form, region": (lambda: largest(b2v=0.9, **LITTLE), SQUARES),
    "max form, tadam": (lambda: largest(TADAM, clip=None, gamma=1.0), scaled(0.1, LITTLE_SQUARES)),
}
REGIONS = [n for n in CASES if n not in ("max form", "max form, no clip", "max form, clip")]


def oracles_path(name):
    """(the path, with radius and predicted reduction if there are any; the oracle)."""
    pair, given = CASES[name]
    given = {"hessian" if n == "sample" else n: x for n, x in given.items()}

    def watch(oracle):
        return {"radius": oracle.dt, "predicted": oracle.pr} if name in REGIONS else {}

    _, oracle = pair()
    return theirs(oracle, watch=watch, **given), oracle


@pytest.mark.parametrize("name", [n for n in REGIONS if n != "soaa, no losses"])
def test_the_cases_visit_both_bounds_and_the_inside(name):
    path, oracle = oracles_path(name)
    power = np.arange(STEPS) / T
    low, high = (1 - oracle.gamma) ** power, 1 + oracle.gamma**power
    at = np.isclose(path["radius"], low), np.isclose(path["radius"], high)
    assert all(a[1:].any() for a in at) and not (at[0] | at[1]).all()
    assert (path["predicted"] > oracle.eps).sum() > 2


@pytest.mark.parametrize(
    ("name", "fires"),
    [
        ("soaa", "some"),
        ("soaa, small gradients", "none"),
        ("soaa, large gradients", "all"),
        ("tadam", "some"),
        ("tadam, small gradients", "none"),
    ],
)
def test_the_cases_visit_the_fisher_branch_or_not(name, fires):
    """If it is not taken, a coordinate takes Adam's step times the radius."""
    path, oracle = oracles_path(name)
    dt = path["radius"][-1 if name.startswith("tadam") else -2]
    m, s = oracle.momentum.read(True), oracle.second.read(True)
    adams = {n: np.abs(dt * m[n] / (np.sqrt(s[n]) + oracle.eps)) for n in m}
    shorter = [np.abs(oracle.direction[n]) < (1 - 1e-9) * adams[n] for n in m]
    share = np.mean(np.concatenate([np.ravel(x) for x in shorter]))
    assert {"none": share == 0, "some": 0.1 < share < 0.95, "all": share == 1}[fires]


SINGLE = (
    "soaa, others",
    "tadam, others",
    "sophia, as printed",
    "adam, missing",
    "max form, clip",
)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, "float64") for n in CASES), *((n, "float32") for n in SINGLE)]
)
def test_every_step_is_the_equation(name, dtype):
    """The radius is a quotient of differences of losses, which cancel in float32."""
    pair, given = CASES[name]

    def watch(state):
        names = ("radius", "predicted") if name in REGIONS else ()
        return {n: optax.tree.get(state, n) for n in names}

    expected, _ = oracles_path(name)
    with jax.enable_x64(dtype == "float64"):
        path, _ = ours(pair()[0], dtype, watch=watch, **given)
        limits = {"float64": (1e-10, 1e-13), "float32": (3e-5, 1e-5)}[dtype]
        assert_equal_paths(path, expected, dtype, rtol=limits[0], atol=limits[1])


# ---------------------------------------------------------------- the scale of a language model

CONFIG = DecoderConfig(vocab_size=64, context=16, width=16, layers=2, heads=2)


def test_on_a_language_model_soaa_is_adam_times_a_radius_of_three_quarters_to_two():
    """SOAA's Fisher never exceeds the root of the second moment there."""
    steps, learning_rate, gamma, eps = 12, 1e-2, 0.25, 1e-8
    model = split(CONFIG)
    tokens = jax.random.randint(jax.random.key(1), (4, CONFIG.context + 1), 0, 64)
    tx, adam = soaa(learning_rate, steps, gamma=gamma, eps=eps), optax.scale_by_adam(eps=eps)

    def loss(params):
        logits = model.apply(cast(params, "float32"), tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(carry, _):
        params, state, adam_state = carry
        value, grads = jax.value_and_grad(loss)(params)
        radius = state[0].radius
        updates, state = tx.update(grads, state, params, value=value)
        direction, adam_state = adam.update(grads, adam_state)
        inner = state[0].inner
        m = optax.tree.bias_correction(inner.momentum.ema, 0.9, inner.momentum.count)
        s = jax.tree.map(lambda h: h / inner.curvature.mass, inner.curvature.h)
        size = sum(x.size for x in jax.tree.leaves(s))
        gain = 1 + optax.tree.norm(m, squared=True) / (optax.tree.sum(s) + size * eps)
        share = jax.tree.map(lambda s: jnp.max(radius * gain * jnp.sqrt(s)), s)  # r F / sqrt(s)
        out = {"ours": updates, "adam": direction, "radius": radius, "share": share}
        carry = optax.apply_updates(params, updates), state, adam_state
        return carry, out | {"next": state[0].radius}

    with jax.enable_x64(True):
        params = cast(model.init(jax.random.key(0)), "float64")
        carry = params, tx.init(params), adam.init(params)
        out = jax.device_get(jax.lax.scan(step, carry, length=steps)[1])
    assert max(map(np.max, jax.tree.leaves(out["share"]))) < 1
    power = np.arange(steps) / steps
    low, high = (1 - gamma) ** power, 1 + gamma**power
    assert (out["next"] >= low - 1e-12).all() and (out["next"] <= high + 1e-12).all()
    assert 0.75 <= out["next"].min() < 0.96 and 1.4 < out["next"].max() <= 2

    def assert_adam(ours, adams):
        expected = -learning_rate * np.moveaxis(np.moveaxis(adams, 0, -1) * out["radius"], -1, 0)
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-16)

    jax.tree.map(assert_adam, out["ours"], out["adam"])
