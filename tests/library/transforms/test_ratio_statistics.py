"""clip_by_ratio: which coordinates its statistics count, when, and at what cost."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ratios import (
    DENOMINATORS,
    RNG,
    H,
    M,
    V,
    given_curvature,
    given_moment,
    identity,
    program,
    ratio,
    single,
    updated,
)

from sophia_optax import ema, floor, rms_floor, shift
from sophia_optax.transforms.ratio_statistics import every_nth


def test_the_fractions_are_those_of_the_bound_at_that_radius():
    """A coordinate is clipped if it moves by r times the threshold."""
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
    """A coordinate wins if its ratio is below the threshold, as the authors count it."""
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


@pytest.mark.parametrize("refresh", [False, np.False_])
def test_a_static_no_leaves_no_reduction_and_no_cond(refresh):
    assert not re.search(r"reduce_\w+\[|cond\[", program(ratio(floor(1.0)), refresh=refresh)())


def test_a_static_yes_reduces_without_a_cond():
    text = program(ratio(floor(1.0)), refresh=True)()
    assert "reduce_sum[" in text and "cond[" not in text


@pytest.mark.parametrize("off", [{"statistics": False}, {"clip_threshold": None}])
def test_statistics_that_are_off_take_no_memory_and_no_work(off):
    # `hessian_estimate` has a sum of its own, to test the sample.
    tx = ratio(floor(1.0), curvature=identity(), **off)
    state = tx.init(single(M))
    assert (state.clipped, state.floored) == ((), ())
    assert "reduce_sum[" not in program(tx, refresh=True)()
    threshold = off.get("clip_threshold", 1.0)
    on = ratio(floor(1.0), curvature=identity(), clip_threshold=threshold)
    assert ("reduce_sum[" in program(on, refresh=True)()) == (threshold is not None)
    np.testing.assert_array_equal(updated(tx)[0]["b"], updated(on)[0]["b"])


def test_counts_above_two_to_the_24_are_exact_enough():
    """Added one by one, ones in float32 stop at 16777216."""
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
    (5120, 384): (16, 4),  # 384 admits a stride of 4: 192, then 96 positions are left
    (3, 256, 12, 64): (1, 4, 1, 1),
    (1000,): (1,),
    (4096,): (64,),
    (): (),
}


@pytest.mark.parametrize("shape", SHARES)
def test_the_fractions_are_those_of_every_nth_coordinate_along_each_axis(shape):
    """Each coordinate has the weight of those it represents; the second leaf is taken whole."""
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
    """With all coordinates there is no error."""
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
    """One in 3 of 2048 rows is dead, and one in 3 of 512 columns is clipped."""
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
    """64 shards of 12 positions: a stride of 8 would leave 96, which 64 does not divide."""
    mesh = jax.sharding.AbstractMesh((64,), ("fsdp",), axis_types=(AXES[1],))
    for n, stride in ((768, 4), (8192, 64)):
        x = jax.ShapeDtypeStruct((n,), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))
        with jax.sharding.use_abstract_mesh(mesh):
            part = jax.eval_shape(lambda x: every_nth(x, 1 / 64), x)
        assert part.shape == (n // stride,) and n // stride % 64 == 0
