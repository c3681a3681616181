"""clip_by_ratio: the ratio, its bound, its denominators and its statistics."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_optax import (
    clip_by_ratio,
    ema,
    floor,
    hessian_estimate,
    rms_floor,
    second_moment,
    shift,
    squared_gradient,
)
from sophia_optax.transforms.ratio_statistics import every_nth

TINY = np.finfo(np.float32).tiny
RNG = np.random.default_rng(0)
M = {"a": RNG.normal(size=()), "b": RNG.normal(size=(4, 5)), "c": RNG.normal(size=(7,))}
H = {n: RNG.normal(0.5, 2.0, size=x.shape) for n, x in M.items()}
H["b"][1], H["c"][:3] = 0.0, -1.0  # rows without curvature, and concave ones


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def identity():
    return optax.GradientTransformation(lambda params: (), lambda u, s, p=None: (u, s))


def given_curvature(**arguments):
    """The sample itself: m is the gradient, h is `hessian=`."""
    return hessian_estimate(squared_gradient(), decay=0.0, bias_correction=False, **arguments)


def ratio(denominator, momentum=None, curvature=None, **arguments):
    momentum, curvature = momentum or identity(), curvature or given_curvature()
    return clip_by_ratio(momentum, curvature, denominator=denominator, **arguments)


def updated(tx, m=M, h=H, state=None, **extra):
    m = single(m)
    return tx.update(m, tx.init(m) if state is None else state, hessian=single(h), **extra)


DENOMINATORS = {
    "floor": (floor(0.5, 0.1), lambda h: np.maximum(0.5 * h, 0.1), 0.1),
    "shift": (shift(0.1, 0.5), lambda h: 0.5 * h + 0.1, 0.1),
}


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("threshold", [1.0, 0.2, 30.0, None])
@pytest.mark.parametrize("name", DENOMINATORS)
def test_the_update_is_the_clipped_ratio(name, threshold, two_sided):
    denominator, formula, _ = DENOMINATORS[name]
    tx = ratio(denominator, clip_threshold=threshold, two_sided=two_sided)
    u, _ = updated(tx)
    for n in M:
        bound = np.inf if threshold is None else threshold
        expected = np.clip(M[n] / formula(H[n]), -bound if two_sided else -np.inf, bound)
        np.testing.assert_allclose(u[n], expected, rtol=1e-5)


def test_momentum_and_curvature_are_fed_the_same_gradient():
    """The curvature in a chain would be handed the momentum."""
    tx = clip_by_ratio(
        optax.ema(0.9, debias=False, accumulator_dtype=None),
        hessian_estimate(squared_gradient(), decay=0.5, update_interval=1, bias_correction=False),
        denominator=shift(1.0),
        clip_threshold=None,
    )
    g, state, m, h = RNG.normal(size=(5, 3)), tx.init(jnp.zeros(3)), 0.0, 0.0
    for t in range(5):
        u, state = tx.update(jnp.asarray(g[t], jnp.float32), state)
        m, h = 0.9 * m + 0.1 * g[t], 0.5 * h + 0.5 * g[t] ** 2
        np.testing.assert_allclose(u, m / (h + 1), rtol=1e-5)


@pytest.mark.parametrize(
    "denominator", [floor(1.0, 0.0), shift(0.0), floor(0.0, 0.0), rms_floor(1.0, 0.0)]
)
def test_the_floor_is_the_smallest_normal_float32(denominator):
    zero = jnp.array([0.0, -0.0])
    np.testing.assert_array_equal(denominator(zero, zero), TINY)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("denominator", [floor(0.1), shift(1e-15), floor(1.0, 0.0), rms_floor()])
@pytest.mark.parametrize("curvature", [given_curvature, identity])
def test_zero_over_zero_is_zero(curvature, denominator, dtype):
    """In float16 each floor is zero, even where the curvature is not our own transformation."""
    with jax.enable_x64(True):
        g = jnp.zeros(3, dtype)
        tx = ratio(denominator, curvature=curvature())
        u, _ = tx.update(g, tx.init(g))
        assert u.dtype == g.dtype and not u.any()


def test_the_ratio_is_computed_in_float32_and_cast_last():
    g = jnp.array([3e-4, 1.0], jnp.float16)  # squares below what float16 resolves
    tx = ratio(floor(1.0, 1e-12), clip_threshold=None)
    u, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(u, 1 / np.asarray(g, np.float32), rtol=1e-3)


def test_float64_keeps_its_precision():
    with jax.enable_x64(True):
        m, h = jnp.array([1 / 3]), jnp.array([1 / 7])
        tx = ratio(floor(1.0), clip_threshold=None)
        u, _ = tx.update(m, tx.init(m), hessian=h)
        np.testing.assert_allclose(u, 7 / 3, rtol=1e-15)


# ---------------------------------------------------------------- second moment, gain, radius

V = {n: RNG.gamma(1.0, 0.3, size=x.shape) for n, x in M.items()}


def given_moment(v=V):
    return optax.stateless(lambda updates, params: single(v))


@pytest.mark.parametrize("threshold", [0.3, None])
def test_curvature_below_the_root_of_the_second_moment_leaves_adam(threshold):
    """The max form: u = clip(m / (max(gamma h, sqrt(v)) + eps))."""
    tx = ratio(rms_floor(0.5, 0.1), second_moment=given_moment(), clip_threshold=threshold)
    u, _ = updated(tx)
    bound, adams = threshold or np.inf, []
    for n in M:
        adams.append(np.ravel(0.5 * H[n] < np.sqrt(V[n])))
        expected = np.clip(M[n] / (np.maximum(0.5 * H[n], np.sqrt(V[n])) + 0.1), -bound, bound)
        np.testing.assert_allclose(u[n], expected, rtol=1e-5)
    assert 0.2 < np.concatenate(adams).mean() < 0.8


def test_without_a_second_moment_the_root_is_that_of_the_curvature():
    """Of the curvature itself, not of what gain and radius make of it."""
    h = {n: np.abs(x) for n, x in H.items()}
    tx = ratio(rms_floor(1.0, 0.1), gain=lambda m, h: 0.5, clip_threshold=None)
    u, _ = updated(tx, h=h, radius=jnp.asarray(0.8))
    for n in M:
        expected = 0.8 * M[n] / (np.maximum(0.8 * 0.5 * h[n], np.sqrt(h[n])) + 0.1)
        np.testing.assert_allclose(u[n], expected, rtol=1e-5)


def test_the_second_moment_is_fed_the_gradient_and_not_the_momentum():
    tx = ratio(
        rms_floor(0.0, 0.1),
        momentum=optax.ema(0.5, debias=True, accumulator_dtype=None),
        second_moment=second_moment(0.5),
        clip_threshold=None,
    )
    state, g = tx.init(jnp.zeros(3)), RNG.normal(size=(2, 3))
    for t in range(2):
        u, state = tx.update(jnp.asarray(g[t], jnp.float32), state)
    m, v = (x[0] / 3 + x[1] * 2 / 3 for x in (g, g**2))
    np.testing.assert_allclose(u, m / (np.sqrt(v) + 0.1), rtol=1e-5)


def test_the_gain_is_a_factor_on_h_from_the_whole_trees():
    seen = []

    def gain(m, h):
        seen.append((m, h))
        return sum(map(jnp.vdot, jax.tree.leaves(m), jax.tree.leaves(h)))

    u, _ = updated(ratio(floor(0.5, 0.1), gain=gain, clip_threshold=None))
    factor = sum((M[n] * H[n]).sum() for n in M)
    for n in M:
        expected = M[n] / np.maximum(0.5 * factor * H[n], 0.1)
        np.testing.assert_allclose(u[n], expected, rtol=1e-4)
    ((m, h),) = seen
    np.testing.assert_allclose((m["b"], h["b"]), (M["b"], H["b"]), rtol=1e-6)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("threshold", [0.4, None])
@pytest.mark.parametrize("r", [0.75, 1.0, 1.9])
def test_a_radius_leaves_newton_steps_and_scales_every_other(r, threshold, two_sided):
    """The ratio r m / max(r gamma h, eps), bounded by r times the threshold."""
    tx = ratio(floor(0.5, 0.1), clip_threshold=threshold, two_sided=two_sided)
    u, state = updated(tx, radius=jnp.asarray(r))
    bound, linear, quadratic = r * threshold if threshold else np.inf, 0.0, 0.0
    for n in M:
        full = r * M[n] / np.maximum(0.5 * r * H[n], 0.1)
        expected = np.clip(full, -bound if two_sided else -np.inf, bound)
        np.testing.assert_allclose(u[n], expected, rtol=1e-5)
        newton = (0.5 * r * H[n] > 0.1) & (np.abs(full) < bound)
        step = M[n] / np.where(newton, 0.5 * H[n], np.inf)
        np.testing.assert_allclose(np.where(newton, u[n], 0), step, rtol=1e-5)
        linear += (M[n] * expected).sum()
        quadratic += (H[n] * expected**2).sum()
    np.testing.assert_allclose(state.predicted_reduction, (linear, quadratic), rtol=1e-5)


def test_the_fractions_are_those_of_the_bound_at_that_radius():
    """A coordinate is clipped where it moves r times the threshold."""
    fractions = []
    for r in (1.0, 2.0):
        u, state = updated(ratio(floor(0.5, 0.1)), radius=jnp.asarray(r))
        live = [r * 0.5 * H[n] > 0.1 for n in M]
        hit = [x & (np.abs(u[n]) >= r) for x, n in zip(live, M, strict=True)]
        number = sum(x.sum() for x in live)
        expected = sum(x.sum() for x in hit) / number, 1 - number / sum(x.size for x in live)
        np.testing.assert_allclose((state.clipped, state.floored), expected, rtol=1e-6)
        fractions.append(expected)
    assert fractions[0] != fractions[1]


def test_above_the_root_of_the_second_moment_coordinates_are_live():
    tx = ratio(rms_floor(0.5, 0.1), second_moment=given_moment())
    _, state = updated(tx)
    live = [0.5 * H[n] > np.sqrt(V[n]) for n in M]
    share = sum(x.sum() for x in live) / sum(x.size for x in live)
    assert 0.2 < share < 0.8
    np.testing.assert_allclose(state.floored, 1 - share, rtol=1e-6)


def test_without_a_radius_no_sums_are_taken():
    tx = ratio(floor(1.0), curvature=identity(), statistics=False)
    _, state = updated(tx)
    assert state.predicted_reduction == (0, 0)
    assert "reduce_sum[" not in program(tx)()
    assert "reduce_sum[" in program(tx, radius=1.0)()


def test_the_sums_are_float64_where_a_parameter_is():
    with jax.enable_x64(True):
        m = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.full(2, 1 / 3)}
        tx = ratio(floor(1.0, 1.0))
        u, state = tx.update(m, tx.init(m), radius=jnp.asarray(1.0))
        assert {n: x.dtype for n, x in u.items()} == {"a": "bfloat16", "b": "float64"}
        assert {x.dtype.name for x in state.predicted_reduction} == {"float64"}
        np.testing.assert_allclose(state.predicted_reduction.linear, 2 + 2 / 9, rtol=1e-14)


# ---------------------------------------------------------------- statistics


def expected_fractions(name, threshold, two_sided, m=M, h=H):
    """(clipped / above the floor, at the floor / all), coordinate by coordinate."""
    _, formula, least = DENOMINATORS[name]
    live = clipped = size = 0
    for n in m:
        d = formula(h[n])
        u = m[n] / d
        is_live = d > least
        live, size = live + is_live.sum(), size + d.size
        clipped += (is_live & ((np.abs(u) if two_sided else u) >= threshold)).sum()
    return clipped / live, 1 - live / size


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("threshold", [1.0, 0.4])
@pytest.mark.parametrize("name", DENOMINATORS)
def test_fractions_count_the_clipped_above_the_floor_and_the_floored_of_all(
    name, threshold, two_sided
):
    h = H if name == "floor" else {n: np.abs(x) for n, x in H.items()}
    tx = ratio(DENOMINATORS[name][0], clip_threshold=threshold, two_sided=two_sided)
    _, state = updated(tx, h=h)
    expected = expected_fractions(name, threshold, two_sided, h=h)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    np.testing.assert_allclose((state.clipped, state.floored), expected, rtol=1e-6)


def test_a_ratio_at_the_threshold_is_clipped():
    """A coordinate wins if its ratio is below, as the authors count."""
    m, h = {"x": jnp.array([-0.5, 0.5, 0.25, 1.0])}, {"x": jnp.ones(4)}
    _, state = updated(ratio(floor(1.0), clip_threshold=0.5), m, h)
    assert state.clipped == 0.75


def test_without_live_coordinates_all_is_floored_and_nothing_clipped():
    _, state = updated(ratio(floor(1.0)), h={n: np.zeros_like(x) for n, x in H.items()})
    assert (state.clipped, state.floored) == (0, 1)


TWICE = {n: 2 * x for n, x in M.items()}


@pytest.mark.parametrize("refresh", [False, np.False_, jnp.asarray(False), None])
def test_statistics_stay_between_refreshes(refresh):
    tx = ratio(floor(0.5, 0.1), curvature=given_curvature(update_interval=5))
    _, before = updated(tx)
    _, after = tx.update(single(TWICE), before, refresh=refresh)
    assert (after.clipped, after.floored) == (before.clipped, before.floored)
    _, refreshed = updated(tx, TWICE, state=after)
    expected = expected_fractions("floor", 1.0, True, m=TWICE)
    np.testing.assert_allclose((refreshed.clipped, refreshed.floored), expected, rtol=1e-6)
    assert refreshed.clipped != before.clipped


@pytest.mark.parametrize("refresh", [True, jnp.asarray(True), None])
def test_a_rejected_sample_leaves_the_statistics(refresh):
    tx = ratio(floor(0.5, 0.1))
    _, before = updated(tx)
    bad = {n: np.full_like(x, np.nan) for n, x in H.items()}
    u, after = updated(tx, TWICE, bad, before, refresh=refresh)
    assert (after.clipped, after.floored) == (before.clipped, before.floored)
    np.testing.assert_allclose(
        u["b"], np.clip(TWICE["b"] / DENOMINATORS["floor"][1](H["b"]), -1, 1), rtol=1e-5
    )


def test_a_curvature_that_does_not_say_when_it_changed_is_measured_at_every_update():
    tx = ratio(shift(0.1), curvature=optax.stateless(lambda u, p: jax.tree.map(jnp.square, u)))
    state = tx.init(single(M))
    for m in (M, TWICE):
        _, state = tx.update(single(m), state)
        h = {n: x**2 for n, x in m.items()}
        clipped = np.concatenate([np.ravel(np.abs(m[n]) / (h[n] + 0.1) >= 1) for n in m])
        np.testing.assert_allclose(state.clipped, clipped.mean(), rtol=1e-6)


def program(tx, **static):
    g = single(M)

    def update(g, state, extra):
        return tx.update(g, state, **static, **extra)

    def text(**extra):
        return str(jax.make_jaxpr(update)(g, tx.init(g), extra))

    return text


@pytest.mark.parametrize("refresh", [False, np.False_])
def test_a_static_no_leaves_no_reduction_and_no_cond(refresh):
    assert not re.search(r"reduce_\w+\[|cond\[", program(ratio(floor(1.0)), refresh=refresh)())


def test_a_static_yes_reduces_without_a_cond():
    text = program(ratio(floor(1.0)), refresh=True)()
    assert "reduce_sum[" in text and "cond[" not in text


@pytest.mark.parametrize("off", [{"statistics": False}, {"clip_threshold": None}])
def test_statistics_that_are_off_take_no_memory_and_no_work(off):
    tx = ratio(floor(1.0), curvature=identity(), **off)  # a sample is tested by a sum
    state = tx.init(single(M))
    assert (state.clipped, state.floored) == ((), ())
    assert "reduce_sum[" not in program(tx, refresh=True)()
    threshold = off.get("clip_threshold", 1.0)
    on = ratio(floor(1.0), curvature=identity(), clip_threshold=threshold)
    assert ("reduce_sum[" in program(on, refresh=True)()) == (threshold is not None)
    np.testing.assert_array_equal(updated(tx)[0]["b"], updated(on)[0]["b"])


def test_counts_above_two_to_the_24_are_exact_enough():
    """One by one, float32 stops counting at 16777216."""
    n = 3 << 23
    tx = ratio(floor(1.0, 1e-3))
    m, h = jnp.ones(n, jnp.bfloat16), jnp.full(n, 0.5, jnp.bfloat16)
    _, state = jax.jit(lambda m, h: tx.update(m, tx.init(m), hessian=h))(m, h)
    np.testing.assert_allclose((state.clipped, state.floored), (1, 0), atol=1e-6)


# ---------------------------------------------------------------- a share of the coordinates


SHARES = {  # shape: strides at 1/64
    (256, 512): (4, 8),
    (1024, 2048): (8, 8),
    (128, 128): (2, 2),
    (127, 4096): (1, 64),
    (5120, 384): (16, 4),  # 384 has room for 4: 192 and 96 places are left
    (3, 256, 12, 64): (1, 4, 1, 1),
    (1000,): (1,),
    (4096,): (64,),
    (): (),
}


@pytest.mark.parametrize("shape", SHARES)
def test_the_fractions_are_those_of_every_nth_coordinate_along_each_axis(shape):
    """Weighted by what a coordinate stands for, beside a leaf that is whole."""
    rng = np.random.default_rng(1)
    m = {"x": rng.normal(size=shape), "y": rng.normal(size=(5, 3))}
    h = {n: rng.normal(1.0, 0.5, size=x.shape) for n, x in m.items()}
    some = tuple(slice(None, None, n) for n in SHARES[shape])
    weights = {"x": m["x"].size / m["x"][some].size, "y": 1.0}
    live = clipped = size = 0.0
    for n, part in (("x", some), ("y", ...)):
        mine, curvature = m[n][part].astype(np.float32), 0.5 * h[n][part].astype(np.float32)
        live += weights[n] * (curvature > 0.1).sum()
        clipped += weights[n] * ((curvature > 0.1) & (abs(mine) >= curvature)).sum()
        size += m[n].size
    _, state = updated(ratio(floor(0.5, 0.1)), m, h)
    expected = clipped / live, 1 - live / size
    np.testing.assert_allclose((state.clipped, state.floored), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [1 / 64, 1 / 4, 1.0])
def test_a_share_estimates_the_whole_within_its_standard_error(share):
    """Coordinate by coordinate; with all of them there is no error."""
    m, h = ({"x": RNG.normal(size=(512, 1024))} for _ in range(2))
    _, part = updated(ratio(floor(1.0, 0.2), statistics_fraction=share), m, h)
    whole = expected_whole(m["x"], h["x"], 0.2)
    n = share * m["x"].size
    for mine, p in zip((part.clipped, part.floored), whole, strict=True):
        assert abs(mine - p) <= (1e-6 if share == 1 else 5 * np.sqrt(p * (1 - p) / (n / 4)))
        assert share == 1 or mine != pytest.approx(p, abs=1e-7)


def expected_whole(m, h, eps):
    live = h > eps
    return (live & (np.abs(m) >= h)).sum() / live.sum(), 1 - live.mean()


def test_a_share_sees_words_and_channels_alike():
    """Of 2048 words one in 3 is dead; of 512 channels one in 3 is clipped."""
    words, channels = np.arange(2048), np.arange(512)
    h = np.where(words % 3 == 0, 0.0, 1.0)[:, None] * np.ones(512)
    m = np.where(channels % 3 == 0, 2.0, 0.5) * np.ones((2048, 1))
    _, state = updated(ratio(floor(1.0, 0.1)), {"x": m}, {"x": h})
    np.testing.assert_allclose((state.clipped, state.floored), 1 / 3, atol=0.02)


AXES = [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit]
SPECS = {
    "table": ((1024, 768), (None, "fsdp")),
    "matrix": ((768, 1024), ("data", "fsdp")),
    "rows": ((1024, 256), (("data", "fsdp"), None)),
    "stack": ((2, 768, 4, 64), (None, "fsdp", None, None)),
    "vector": ((768,), ("fsdp",)),
}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_on_a_mesh_a_refresh_moves_scalars_alone_and_changes_nothing(axes, dtype):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(axes,) * 2)
    specs = {n: jax.P(*spec) for n, (_, spec) in SPECS.items()}
    rng = np.random.default_rng(2)
    m, h = ({n: rng.normal(size=s) for n, (s, _) in SPECS.items()} for _ in range(2))
    tx = ratio(floor(0.5, 0.1), ema(0.9), given_curvature(dtype=dtype))

    def one(m, h):
        return tx.update(m, tx.init(m), hessian=h)

    alone, _ = expected = jax.jit(one)(single(m), single(h))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs)
        compiled = (
            jax.jit(one).lower(*(jax.device_put(single(x), placed) for x in (m, h))).compile()
        )
        got = compiled(*(jax.device_put(single(x), placed) for x in (m, h)))
    moved = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    results = re.findall(rf"= (\(?[^=]*?) (?:{moved})\(", compiled.as_text())
    shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(results))
    assert shapes and set(shapes) == {""}
    for n, x in alone.items():
        np.testing.assert_allclose(got[0][n], x, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got[1].curvature.h[n], expected[1].curvature.h[n])
    for name in ("clipped", "floored"):
        np.testing.assert_allclose(getattr(got[1], name), getattr(expected[1], name), rtol=1e-5)


def test_of_an_axis_in_more_than_8_shards_each_shard_keeps_its_own():
    """64 shards of 12 places: a stride of 8 would leave 96 places, which 64 do not divide."""
    mesh = jax.sharding.AbstractMesh((64,), ("fsdp",), axis_types=(AXES[1],))
    for n, stride in ((768, 4), (8192, 64)):
        x = jax.ShapeDtypeStruct((n,), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))
        with jax.sharding.use_abstract_mesh(mesh):
            part = jax.eval_shape(lambda x: every_nth(x, 1 / 64), x)
        assert part.shape == (n // stride,) and n // stride % 64 == 0


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: floor(-0.1), "gamma=-0.1 is outside"),
        (lambda: floor(0.1, -1.0), "eps=-1.0 is outside"),
        (lambda: shift(-1.0), "eps=-1.0 is outside"),
        (lambda: shift(0.1, -2.0), "rho=-2.0 is outside"),
        (lambda: floor(float("nan")), "gamma=nan is outside"),
        (lambda: rms_floor(-0.1), "gamma=-0.1 is outside"),
        (lambda: rms_floor(0.1, -1.0), "eps=-1.0 is outside"),
        (lambda: ratio(floor(1.0), clip_threshold=-1.0), "clip_threshold=-1.0 is outside"),
        (lambda: ratio(floor(1.0), clip_threshold=0), "None turns clipping off"),
        (lambda: ratio(floor(1.0), statistics_fraction=1.5), "statistics_fraction=1.5 is outside"),
        (
            lambda: ratio(floor(1.0), statistics_fraction=-0.1),
            "statistics_fraction=-0.1 is outside",
        ),
        (lambda: ratio(floor(1.0), statistics_fraction=0), "statistics=False takes none"),
    ],
)
def test_arguments_out_of_range_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_traced_arguments_pass():
    @jax.jit
    def run(gamma, eps, threshold):
        return updated(ratio(floor(gamma, eps), clip_threshold=threshold))

    u, state = run(0.5, 0.1, 0.4)
    expected, _ = updated(ratio(floor(0.5, 0.1), clip_threshold=0.4))
    np.testing.assert_allclose(u["b"], expected["b"], rtol=1e-6)
    assert state.clipped > 0
    np.testing.assert_allclose(jax.jit(lambda e, r: shift(e, r)(jnp.ones(2)))(0.5, 2.0), 2.5)


def test_our_own_arithmetic_needs_no_implicit_promotion():
    g = {"a": jnp.ones((), jnp.bfloat16), "b": jnp.ones(3)}
    with jax.numpy_dtype_promotion("strict"):
        for denominator in (floor(1.0), shift(1.0), rms_floor()):
            tx = ratio(denominator, second_moment=second_moment(0.9), gain=lambda m, h: 2.0)
            for extra in ({}, {"radius": jnp.asarray(1.0)}):
                jax.eval_shape(lambda s, tx=tx, x=extra: tx.update(g, s, **x), tx.init(g))
