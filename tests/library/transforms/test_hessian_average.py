"""hessian_estimate: the average and its mass, rejected samples, and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_optax import hessian_estimate, sophia_h, squared_gradient
from sophia_optax.transforms.stochastic_rounding import noise, round_to
from train.parallel import xla_flags

PARAMS = {"a": jnp.zeros(()), "b": jnp.zeros((2, 3))}


def full(value):
    return jax.tree.map(lambda x: jnp.full_like(x, value), PARAMS)


def given_sample(key, params, updates, *, sample, **unused):
    return sample


def estimate(estimator, *, decay=0.0, bias_correction=False, **arguments):
    """By default the output is the last sample."""
    return hessian_estimate(estimator, decay=decay, bias_correction=bias_correction, **arguments)


def leaf(tree):
    return float(tree["b"][0, 0])


# ---------------------------------------------------------------- the average and its mass


@pytest.mark.parametrize("debias", [True, False])
def test_mass_is_the_weight_of_the_accepted_samples(debias):
    """With a decay schedule, rejections and host-driven refreshes; while mass is 0, so is h."""
    rng = np.random.default_rng(0)
    samples, refreshes = rng.normal(2.0, 1.0, size=(30, 3)), rng.random(30) < 0.6
    samples[rng.random(30) < 0.3, 1] = np.nan
    refreshes[:2] = False
    decays = np.linspace(0.3, 0.95, 30)
    factory = optax.inject_hyperparams(
        hessian_estimate, static_args="estimator", hyperparam_dtype=jnp.float32
    )
    tx = factory(given_sample, decay=lambda t: 0.3 + 0.65 * t / 29, bias_correction=debias)

    def step(state, xs):
        sample, refresh = xs
        h, state = tx.update(sample, state, sample=sample, refresh=refresh)
        return state, (h, state.inner_state.mass)

    xs = (jnp.asarray(samples, jnp.float32), jnp.asarray(refreshes))
    _, (outputs, masses) = jax.lax.scan(step, tx.init(jnp.zeros(3)), xs)
    h, mass = np.zeros(3), 0.0
    for t in range(30):
        if refreshes[t] and np.isfinite(samples[t]).all():
            h = decays[t] * h + (1 - decays[t]) * samples[t]
            mass = decays[t] * mass + (1 - decays[t])
        expected = h / mass if debias and mass else h
        np.testing.assert_allclose(outputs[t], expected, rtol=1e-5)
        np.testing.assert_allclose(masses[t], mass, rtol=1e-5)
    assert not outputs[0].any() and outputs[-1].all()


def test_a_corrected_average_of_equal_samples_is_the_sample():
    tx = hessian_estimate(squared_gradient(), decay=0.99, update_interval=3)
    _, h = jax.lax.scan(lambda s, _: tx.update(full(3.0), s)[::-1], tx.init(PARAMS), length=20)
    np.testing.assert_allclose(h["b"], 9.0, rtol=1e-6)


@pytest.mark.parametrize("start", ["counted", "rejected"])
def test_h_counts_as_zero_while_no_sample_was_accepted(start):
    tx = hessian_estimate(given_sample)
    sample, refresh = (full(1.0), False) if start == "counted" else (full(np.inf), True)
    h, state = tx.update(full(1.0), tx.init(PARAMS), sample=sample, refresh=refresh)
    assert state.mass == 0 and leaf(h) == 0


def test_counters_saturate():
    top = np.iinfo(np.int32).max
    full_counters = dict.fromkeys(("count", "accepted", "rejected", "age"), jnp.int32(top))
    tx = estimate(given_sample)
    state = tx.init(PARAMS)._replace(**full_counters)
    for sample, refresh in ((1.0, False), (np.nan, True), (1.0, True)):
        _, new = tx.update(full(1.0), state, sample=full(sample), refresh=refresh)
        assert (new.count, new.accepted, new.rejected) == (top, top, top)
        assert new.age == (0 if sample == 1.0 and refresh else top)


@pytest.mark.parametrize("init", [lambda tx: tx.init, lambda tx: jax.jit(tx.init)])
def test_every_scalar_has_its_own_buffer(init):
    tx = sophia_h(0.1, estimator=squared_gradient())
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    for _ in range(2):
        state = init(tx)(PARAMS)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
        for _ in range(2):
            _, state = step(full(1.0), state, PARAMS)


# ---------------------------------------------------------------- rejection


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("refresh", [None, True, jnp.asarray(True)])
def test_a_sample_that_is_not_finite_is_refused_whole_and_counted(bad, refresh):
    tx = hessian_estimate(given_sample, decay=0.5, update_interval=2)
    _, before = tx.update(full(1.0), tx.init(PARAMS), sample=full(3.0))
    before = before._replace(count=jnp.asarray(2))
    poisoned = full(7.0) | {"b": full(7.0)["b"].at[1, 2].set(bad)}
    h, after = tx.update(full(1.0), before, sample=poisoned, refresh=refresh)
    assert leaf(h) == 3.0 and after.mass == before.mass
    jax.tree.map(np.testing.assert_array_equal, after.h, before.h)
    assert (after.accepted, after.rejected, after.age, after.count) == (1, 1, 1, 3)
    h, after = tx.update(full(1.0), after, sample=full(6.0), refresh=True)
    np.testing.assert_allclose(leaf(h), (0.25 * 3 + 0.5 * 6) / 0.75)
    assert (after.accepted, after.rejected, after.age) == (2, 1, 0)


SPOILT = full(8.0) | {"b": full(8.0)["b"].at[1, 2].set(jnp.nan)}
BY_COUNTER = {"sample": SPOILT}
ASKED_FOR = [BY_COUNTER | {"refresh": True}, {"hessian": SPOILT}]


def after_a_spoilt_sample(told, **arguments):
    """The average of 4 and of `SPOILT`."""
    tx = estimate(given_sample, decay=0.5, **arguments)
    _, state = tx.update(full(1.0), tx.init(PARAMS), sample=full(4.0))
    return tx.update(full(1.0), state, **told)


@pytest.mark.parametrize(
    ("told", "arguments"),
    [
        (BY_COUNTER, {"update_interval": 1}),
        *[
            (told, {"update_interval": k, "reject": "coordinate"})
            for told in ASKED_FOR
            for k in (1, 3)
        ],
    ],
)
def test_rejection_by_coordinate_averages_the_others_and_counts_nothing(told, arguments):
    """The default if the counter samples at every update."""
    h, state = after_a_spoilt_sample(told, **arguments)
    np.testing.assert_allclose(h["b"], [[5, 5, 5], [5, 5, 2]])
    assert (state.accepted, state.rejected, state.age) == (2, 0, 0)


@pytest.mark.parametrize(
    ("told", "arguments"),
    [
        (BY_COUNTER, {"update_interval": 1, "reject": "sample"}),
        *[(told, {"update_interval": k}) for told in ASKED_FOR for k in (1, 3)],
    ],
)
def test_rejection_of_the_whole_sample_keeps_h_and_is_counted(told, arguments):
    """The default for samples that the caller asks for, at every interval."""
    h, state = after_a_spoilt_sample(told, **arguments)
    np.testing.assert_allclose(h["b"], 2)
    assert (state.accepted, state.rejected, state.age) == (1, 1, 1)


def test_an_unknown_rule_of_rejection_is_named():
    with pytest.raises(ValueError, match="reject='leaf' is unknown; choose one of auto, sample"):
        estimate(given_sample, reject="leaf")


def test_a_sample_beyond_the_range_of_h_is_refused():
    with jax.enable_x64(True):
        tx, params = estimate(None), jnp.zeros(2, jnp.float32)
        h, state = tx.update(params, tx.init(params), hessian=jnp.array([1.0, 1e300]))
        assert state.rejected == 1 and not h.any()


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("params", "dtype", "held", "given_out"),
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "float32", "float32"),
        ("float16", None, "float32", "float32"),
        ("float64", None, "float64", "float64"),
        ("float64", "float32", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
    ],
)
def test_h_is_float32_at_least_unless_stated_and_given_out_so(params, dtype, held, given_out):
    with jax.enable_x64(True):
        x = jnp.ones(2, params)
        for debias in (True, False):
            tx = hessian_estimate(squared_gradient(), dtype=dtype, bias_correction=debias)
            h, state = tx.update(x, tx.init(x), refresh=True)
            assert (tx.init(x).h.dtype, state.h.dtype, h.dtype) == (held, held, given_out)
            assert state.mass.dtype == jnp.promote_types(params, "float32")


@pytest.mark.parametrize("dtype", ["float16", jnp.float16, "float8_e4m3fn", "int32"])
def test_dtypes_that_cannot_hold_curvature_are_refused(dtype):
    with pytest.raises(ValueError, match=r"cannot hold curvature.*'bfloat16'"):
        hessian_estimate(squared_gradient(), dtype=dtype)


def test_bfloat16_h_reaches_the_mean_where_rounding_to_nearest_stalls():
    truth, decay = 2.0, 0.99
    tx = estimate(given_sample, decay=decay, dtype="bfloat16")
    params = jnp.zeros(4096)

    def step(carry, _):
        state, nearest = carry
        _, state = tx.update(params, state, sample=jnp.full_like(params, truth), refresh=True)
        nearest = (decay * nearest.astype(float) + (1 - decay) * truth).astype(jnp.bfloat16)
        return (state, nearest), None

    start = (tx.init(params), jnp.zeros([], jnp.bfloat16))
    (state, nearest), _ = jax.lax.scan(step, start, length=1000)
    assert state.h.dtype == jnp.bfloat16
    assert 1.6 < nearest < 1.75
    assert abs(state.h.astype(float).mean() - truth * (1 - decay**1000)) < 5e-3


def test_stochastic_rounding_is_unbiased_and_between_the_neighbours():
    tx = estimate(given_sample, dtype="bfloat16")
    n = 1 << 14
    for x in (1.001, -1.0066, 3e-30, 1.0):
        h, _ = tx.update(jnp.zeros(n), tx.init(jnp.zeros(n)), sample=jnp.full(n, x), refresh=True)
        low, high = float(h.min()), float(h.max())
        share = (np.float32(x) - low) / (high - low) if high > low else 0.0
        assert low <= np.float32(x) <= high and high - low <= abs(x) * 2**-7
        assert abs(float((h == high).mean()) - share) < 5 * 0.5 / np.sqrt(n) or low == high
    assert low == high == 1.0  # bfloat16 can represent 1


def rounded_up(key, shape=(64, 128)):
    """For numbers halfway between two bfloat16 neighbours: which were rounded up, in each leaf."""
    tree = {"a": jnp.full(shape, 1 + 2.0**-8), "b": jnp.full(shape, 1 + 2.0**-8)}
    like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    up = jax.tree.map(lambda x: np.asarray(x > 1, float), round_to(like, tree, key))
    return up["a"], up["b"]


def test_noise_is_another_one_for_each_coordinate_leaf_and_key():
    """No correlation above 5 standard errors between neighbours, rows, leaves, keys or bits."""
    keys = [jax.random.key(0), jax.random.fold_in(jax.random.key(0), 1), jax.random.key(1)]
    (a, b), (c, _), (d, _) = (rounded_up(key) for key in keys)
    assert abs(a.mean() - 0.5) < 5 * 0.5 / 2**6.5
    pairs = [(a, b), (a, c), (a, d), (c, d), (a, a.T.reshape(a.shape))]
    pairs += [(a[:, n:], a[:, :-n]) for n in (1, 2, 3, 64)]
    pairs += [(a[n:], a[:-n]) for n in (1, 2, 32)]
    for x, y in pairs:
        r = np.mean((2 * x - 1) * (2 * y - 1))
        assert abs(r) < 5 / np.sqrt(x.size)
    for axis in (0, 1):  # χ² of columns, of rows
        chi = (4 * a.shape[axis] * (a.mean(axis) - 0.5) ** 2).mean()
        assert abs(chi - 1) < 5 * np.sqrt(2 / a.shape[1 - axis])


def test_noise_has_every_one_of_its_values_alike():
    """χ² of the upper and of the lower 8 of 16 bits, against its standard error."""
    numbers = np.asarray(noise(jnp.uint32(5), (256, 1024)))
    assert numbers.max() < 2**16
    for part in (numbers >> 8, numbers & 255):
        counts = np.bincount(part.ravel(), minlength=256)
        chi = ((counts - 1024) ** 2 / 1024).sum()
        assert abs(chi - 255) < 5 * np.sqrt(2 * 255)


@pytest.mark.parametrize("refused", [False, True])
def test_a_bfloat16_h_that_takes_no_sample_stays_to_the_bit(refused):
    tx = estimate(given_sample, dtype="bfloat16")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 30)), jnp.float32)
    _, state = tx.update(x, tx.init(x), sample=x, refresh=True)
    bad = x.at[3, 4].set(jnp.inf)
    _, after = tx.update(x, state, sample=bad, refresh=refused)
    assert after.rejected == refused and after.accepted == 1
    np.testing.assert_array_equal(after.h.astype(np.float32), state.h.astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 4095, 2000])
def test_one_number_in_a_large_leaf_is_seen_by_the_program_that_users_run(bad, place):
    """With the compiler optimizations that other tests turn off."""
    tx = estimate(given_sample)
    x = jnp.ones((64, 64))

    def update(state, sample):
        return tx.update(x, state, sample=sample, refresh=True)[1]

    options = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    options = xla_flags.known(options)  # XLA without the second always emits such code
    program = jax.jit(update).lower(tx.init(x), x).compile(compiler_options=options)
    assert program(tx.init(x), jnp.full_like(x, 3e38)).accepted == 1
    spoilt = x.ravel().at[place].set(bad).reshape(x.shape)
    assert program(tx.init(x), spoilt).rejected == 1


def derived_bits(key, n):
    key = jax.random.fold_in(jax.random.fold_in(key, 1), 0)
    return jax.random.bits(key, (n,), jnp.uint16).astype(jnp.uint32)


def own_bits(key, n):
    """What rounding would add if it used the key of the estimator."""
    return noise(jax.random.bits(key, (1,), jnp.uint32)[0], (n,))


@pytest.mark.parametrize("bits_of", [derived_bits, own_bits])
def test_rounding_is_independent_of_keys_that_an_estimator_derives(bits_of):
    n = 1 << 12

    def estimator(key, params, updates, **unused):
        bits = jnp.uint32(0x3F800000) | bits_of(key, n)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    tx = estimate(estimator, dtype="bfloat16")
    h, _ = tx.update(jnp.zeros(n), tx.init(jnp.zeros(n)), refresh=True)
    sample = estimator(jax.random.fold_in(jax.random.key(0), 0), None, None)
    remainder = (sample - 1) * 2**7  # in [0, 1): the chance to be rounded up
    up = h > 1
    low = remainder < 0.5
    assert abs(float(up[low].mean()) - 0.25) < 0.05 and abs(float(up[~low].mean()) - 0.75) < 0.05


def test_our_own_arithmetic_needs_no_implicit_promotion():
    params = {"a": jnp.ones((), jnp.bfloat16), "b": jnp.ones(3)}
    with jax.numpy_dtype_promotion("strict"):
        for dtype in (None, "bfloat16"):
            tx = hessian_estimate(squared_gradient(), dtype=dtype, update_interval=2)
            jax.eval_shape(lambda s, tx=tx: tx.update(params, s), tx.init(params))
