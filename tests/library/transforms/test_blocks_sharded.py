"""`scale_by_blocks` on a mesh: where blocks live, and what eight devices exchange."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_close
from jax.sharding import NamedSharding, PartitionSpec

from sophia_optax import orthosoph, scale_by_blocks
from train.parallel.mesh import MeshConfig, make_mesh, state_shardings

rng = np.random.default_rng(0)

WIDTHS = {"up": (64, 96), "down": (96, 64), "out": (64, 64), "layers": (3, 64, 64), "norm": (64,)}
SPECS = {
    "up": PartitionSpec("fsdp", None),
    "down": PartitionSpec(None, "fsdp"),
    "out": PartitionSpec(None, "fsdp"),
    "layers": PartitionSpec(None, "fsdp"),
    "norm": PartitionSpec(),
}


KEPT = {"b2": 0.9, "update_interval": 3}  # a state of curvature and roots


def sharded(tx, names=tuple(WIDTHS), fsdp=8):
    """(mesh, shardings of params, of state, abstract params)."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp))
    params = {n: jax.ShapeDtypeStruct(WIDTHS[n], jnp.float32) for n in names}
    shardings = {n: NamedSharding(mesh, SPECS[n]) for n in names}
    return shardings, state_shardings(mesh, tx.init, params, shardings), params


def test_state_is_sharded_over_its_blocks():
    _, state, _ = sharded(scale_by_blocks(block_size=8, **KEPT))
    rows, numbers = PartitionSpec("fsdp", None, None, None), PartitionSpec(None)
    layers = PartitionSpec(None, "fsdp", None, None, None)
    expected = {"up": rows, "down": rows, "out": rows, "layers": layers, "norm": numbers}
    assert {n: s.spec for n, s in state.curvature.items()} == expected
    assert {n: s.spec for n, s in state.root.items()} == expected | {"norm": PartitionSpec()}
    _, state, _ = sharded(scale_by_blocks(block_size=16, **KEPT))  # four blocks over eight devices
    assert all(s.is_fully_replicated for s in jax.tree.leaves((state.curvature, state.root)))
    _, state, _ = sharded(scale_by_blocks(block_size=8, form="tiles", **KEPT))
    columns = PartitionSpec(None, "fsdp", None, None)
    specs = {n: s.spec for n, s in state.curvature.items()}
    assert (specs["up"], specs["out"]) == (rows, columns)


def test_concrete_sharded_parameters_make_a_sharded_state():
    mesh = make_mesh(MeshConfig(fsdp=8))
    w = jax.device_put(jnp.ones((64, 96)), NamedSharding(mesh, PartitionSpec("fsdp")))
    state = scale_by_blocks(block_size=8, **KEPT).init({"w": w})
    assert state.root["w"].addressable_shards[0].data.shape == (1, 1, 8, 8)


def test_blocks_of_a_tall_matrix_lie_along_its_columns():
    """Over the mesh axis of its columns, which are the rows of blocks, and not of its rows."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    both = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    params = {"tall": jnp.ones((96, 64)), "wide": jnp.ones((64, 96))}
    state = scale_by_blocks(block_size=8, **KEPT).init(jax.device_put(params, both))
    specs = {name: C.sharding.spec[0] for name, C in state.curvature.items()}
    assert specs == {"tall": "fsdp", "wide": "data"}


THREE = ("down", "out", "norm")


def steps(tx, shardings=None):
    def run(params, seed):
        def body(carry, key):
            params, state = carry
            grads = optax.tree.random_like(key, params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(seed, 5)
        return jax.lax.scan(body, (params, tx.init(params)), keys)[0]

    params = {n: jnp.ones(WIDTHS[n]) for n in THREE}
    if shardings is not None:
        params = jax.device_put(params, shardings[0])
    return jax.jit(run, out_shardings=shardings)(params, jax.random.key(0))


@pytest.mark.parametrize(
    "arguments",
    [{"block_size": 8} | KEPT, {"block_size": 24, "form": "tiles", "b2": 0.9}],
    ids=["rows", "tiles"],
)
def test_eight_devices_equal_one(arguments):
    tx = orthosoph(0.1, mu_dtype=None, **arguments)
    shardings, state, _ = sharded(tx, THREE)
    params, _ = steps(tx, (shardings, state))
    assert len(params["down"].sharding.device_set) == 8
    assert_close(params, steps(tx)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "block_size", "kept", "gathers"),
    [
        (("up", "down"), 8, {}, False),
        (("up", "down"), 8, KEPT, False),
        (("up",), 16, {}, True),
        (("out",), 8, {}, False),
        (("out",), 8, KEPT, True),
    ],
    ids=["aligned", "aligned, kept", "straddling", "columns", "columns, kept"],
)
def test_which_blocks_need_a_gather(names, block_size, kept, gathers):
    """Blocks that straddle devices, and with sharded columns blocks whose C or root is kept."""
    tx = orthosoph(0.1, block_size=block_size, **kept)
    shardings, state_sharding, params = sharded(tx, names)
    update = jax.jit(
        functools.partial(tx.update, refresh=True),
        in_shardings=(shardings, state_sharding, shardings),
        out_shardings=(shardings, state_sharding),
    )
    text = update.lower(params, jax.eval_shape(tx.init, params), params).compile().as_text()
    assert ("all-gather" in text) == gathers
    assert "all-to-all" not in text and "collective-permute" not in text


@pytest.mark.parametrize("arguments", [{"b2": 0.0}, {"b2": 0.9}, {"b2": 0.9, "form": "tiles"}])
@pytest.mark.parametrize("update_interval", [1, 3])
def test_parameters_that_differ_per_shard_keep_their_state_in_a_scan(arguments, update_interval):
    """Each shard of a `shard_map` whitens its own rows; the state is made inside."""
    tx = scale_by_blocks(block_size=2, update_interval=update_interval, **arguments)
    gradients = jax.random.normal(jax.random.key(0), (4, 16, 8))

    def steps(gradients):
        def step(state, g):
            out, state = tx.update(g, state, g)
            return state, out

        return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]

    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec(None, "d")
    out = jax.jit(jax.shard_map(steps, mesh=mesh, in_specs=rows, out_specs=rows))(gradients)
    alone = [jax.jit(steps)(part) for part in jnp.split(gradients, 8, axis=1)]
    assert_close(out, jnp.concatenate(alone, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refresh", [None, True])
def test_traced_numbers_are_taken_on_explicit_axes(refresh):
    """As closures they would keep explicit axes in code that runs on Auto axes."""
    tx = optax.inject_hyperparams(
        orthosoph,
        static_args=("block_size", "block_mask", "weight_decay_mask"),
        hyperparam_dtype=jnp.float32,
    )(0.1, b2=0.9, block_size=2, update_interval=2)
    params = jax.random.normal(jax.random.key(0), (8, 16))

    @jax.jit
    def steps(params, refresh):
        state = tx.init(params)
        for _ in range(3):
            step, state = tx.update(params, state, params, refresh=refresh)
            params = optax.apply_updates(params, step)
        return params

    refresh = None if refresh is None else jnp.asarray(refresh)
    alone = steps(params, refresh)
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)):
        laid = jax.device_put(params, PartitionSpec("data", "model"))
        assert_close(steps(laid, refresh), alone, rtol=1e-4, atol=1e-5)
