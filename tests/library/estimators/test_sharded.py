"""The mesh changes where an estimator works, not what it returns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact import ExactLinear
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from moments import assert_mean, jit

from sophia_optax import gauss_newton_bartlett, hutchinson

ROWS, TOKENS, D, K, V = 16, 2, 3, 8, 4
MESHES = {"8": (8, 1), "2x4": (2, 4)}
SPECS = {
    "w1": PartitionSpec(None, "model"),
    "b1": PartitionSpec("model"),
    "w2": PartitionSpec("model", None),
}
KEY = jax.random.key(3)
rng = np.random.default_rng(0)


def f32(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


PARAMS = {"w1": f32(D, K), "b1": f32(K), "w2": f32(K, V)}
BATCH = {"x": f32(ROWS, TOKENS, D), "y": jnp.asarray(rng.integers(V, size=(ROWS, TOKENS)))}
WEIGHTS = jnp.asarray(rng.uniform(size=(ROWS, TOKENS)) * (np.arange(ROWS) > 2)[:, None], "float32")


def logits_fn(params, batch):
    return jnp.tanh(batch["x"] @ params["w1"] + params["b1"]) @ params["w2"]


def mean_loss(params, batch):
    logits = logits_fn(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def mesh_of(name):
    return jax.make_mesh(MESHES[name], ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def close(have, want):
    for name in want:
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(have[name], want[name], rtol=1e-5, atol=1e-6 * scale)


# ---------------------------------------------------------------- jit on sharded arrays


def estimator(name, shards):
    return {
        "hutchinson": hutchinson(batch_fraction=0.5),
        "one group": gauss_newton_bartlett(),
        "groups side by side": gauss_newton_bartlett(groups=8, parallel_groups=shards),
        "groups one by one": gauss_newton_bartlett(groups=4, batch_fraction=0.5),
    }[name]


def program(name, shards):
    estimate = estimator(name, shards)

    def sample(params, batch, weights):
        extra = {"obj_fn": mean_loss, "logits_fn": logits_fn, "inputs": batch, "weights": weights}
        return estimate(KEY, params, None, **extra)

    return jit(sample)


@functools.cache
def on_one_device(name):
    return program(name, 1)(PARAMS, BATCH, WEIGHTS)


def placed(mesh):
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return jax.device_put((PARAMS, BATCH, WEIGHTS), (params, rows, rows))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "name", ["hutchinson", "one group", "groups side by side", "groups one by one"]
)
def test_sample_is_the_same_on_any_mesh(name, mesh):
    shards = MESHES[mesh][0]
    arguments = placed(mesh_of(mesh))
    assert len(arguments[1]["x"].sharding.device_set) == 8
    close(program(name, shards)(*arguments), on_one_device(name))


@pytest.mark.parametrize("name", ["hutchinson", "groups side by side"])
def test_rows_stay_where_they_are(name):
    """Neither the sub-batch nor the groups move rows: gradients are reduced, nothing else."""
    compiled = program(name, 8).lower(*placed(mesh_of("8"))).compile().as_text()
    assert "all-reduce" in compiled
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled


def test_auto_axes_serves_a_mesh_with_explicit_axes():
    gnb = estimator("groups side by side", 8)

    def sample(params, batch, weights):
        extra = {"logits_fn": logits_fn, "inputs": batch, "weights": weights}
        return gnb(KEY, params, None, **extra)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (["data"], []))
    with jax.set_mesh(mesh):
        arguments = jax.device_put((PARAMS, BATCH, WEIGHTS), (whole, rows, rows))
        h = jit(jax.sharding.auto_axes(sample, out_sharding=PartitionSpec()))(*arguments)
    close(h, on_one_device("groups side by side"))


# ---------------------------------------------------------------- shard_map


def in_shard_map(estimate, *, axis_name="data", check_vma=True, mesh="8"):
    """`(key, params, batch, weights) -> h`, each shard holding its rows and all params."""

    def sample(key, params, batch, weights):
        extra = {"obj_fn": mean_loss, "logits_fn": logits_fn, "inputs": batch, "weights": weights}
        return estimate(key, params, None, axis_name=axis_name, **extra)

    rows = PartitionSpec(axis_name)
    return jax.shard_map(
        sample,
        mesh=mesh_of(mesh),
        in_specs=(PartitionSpec(), PartitionSpec(), rows, rows),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )


@pytest.mark.parametrize(
    ("mode", "check_vma"), [("forward", True), ("forward", False), ("reverse", True)]
)
def test_hutchinson_in_shard_map_is_that_of_the_full_batch(mode, check_vma):
    """All shards use the same probe, and H u is averaged."""
    estimate = hutchinson(mode=mode, num_samples=2)
    want = jit(lambda p, b: estimate(KEY, p, None, obj_fn=mean_loss, inputs=b))(PARAMS, BATCH)
    sample = in_shard_map(estimate, check_vma=check_vma)
    close(jit(sample)(KEY, PARAMS, BATCH, WEIGHTS), want)


def by_hand(key, shards, groups):
    """Σ_i B_i h_i / Σ_i B_i, shard i with the key folded with i."""
    gnb = gauss_newton_bartlett(groups=groups)

    @jit
    def squares(key, batch, weights):
        extra = {"logits_fn": logits_fn, "inputs": batch, "weights": weights}
        h = gnb(key, PARAMS, None, **extra)
        # A shard without weight has h = 0 / 0.
        return jax.tree.map(lambda h: jnp.nan_to_num(h * weights.sum()), h)

    cut = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), (BATCH, WEIGHTS))
    total = jax.tree.map(jnp.zeros_like, PARAMS)
    for i in range(shards):
        batch, weights = jax.tree.map(lambda x: x[i], cut)  # noqa: B023
        total = optax.tree.add(total, squares(jax.random.fold_in(key, i), batch, weights))
    return jax.tree.map(lambda s: s / WEIGHTS.sum(), total)


@pytest.mark.parametrize(
    ("mesh", "axis_name", "settings", "check_vma"),
    [
        ("8", "data", {}, True),
        ("8", "data", {"groups": 2}, True),
        ("8", "data", {"groups": 2}, False),
        ("8", "data", {"groups": 2, "parallel_groups": 2}, True),
        ("2x4", ("data", "model"), {"groups": 2}, True),
    ],
)
def test_gnb_in_shard_map_sums_squares_and_counts_over_shards(mesh, axis_name, settings, check_vma):
    shards = MESHES[mesh][0] if axis_name == "data" else 8
    gnb = gauss_newton_bartlett(**settings)
    sample = in_shard_map(gnb, mesh=mesh, axis_name=axis_name, check_vma=check_vma)
    want = by_hand(KEY, shards, settings.get("groups", 1))
    close(jit(sample)(KEY, PARAMS, BATCH, WEIGHTS), want)


def test_gnb_in_shard_map_is_unbiased():
    x, weights = rng.normal(size=(8, 2)), rng.uniform(size=8)
    params = {"W": rng.normal(size=(2, 3))}
    gnb = gauss_newton_bartlett()

    def sample(keys, x, w):
        def one(key):
            extra = {"logits_fn": lambda params, x: x @ params["W"], "inputs": x, "weights": w}
            p = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
            return gnb(key, p, None, axis_name="data", **extra)

        return jax.vmap(one)(keys)

    rows, all_of_it = PartitionSpec("data"), PartitionSpec()
    samples = jit(
        jax.shard_map(
            sample, mesh=mesh_of("8"), in_specs=(all_of_it, rows, rows), out_specs=all_of_it
        )
    )(jax.random.split(KEY, 20_000), jnp.asarray(x, "float32"), jnp.asarray(weights, "float32"))
    samples = {name: np.asarray(h, np.float64) for name, h in samples.items()}
    assert_mean(samples, ExactLinear("categorical", x, weights).gauss_newton_diagonal(params), 0.1)


def test_shards_draw_different_labels():
    """Each output has a logit of its own, so h shows which label it drew."""

    def own_logits(params, rows):
        return params[rows]

    def sample(params, rows):
        gnb = gauss_newton_bartlett()
        return gnb(KEY, params, None, logits_fn=own_logits, inputs=rows, axis_name="data")

    h = jit(
        jax.shard_map(
            sample,
            mesh=mesh_of("8"),
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )
    )(jnp.zeros((8, 12, V)), jnp.arange(8))
    labels = np.asarray(h).argmax(-1)
    assert len(np.unique(labels, axis=0)) == 8
