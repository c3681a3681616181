"""States with every kind of leaf, folders of checkpoints of them, and damage to the files."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.checkpoint.store import Checkpoints


def mesh_of(*shape: int) -> Mesh:
    names = ("data", "model")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def train_state(seed=0):
    """Every kind of leaf and node that an optax state may hold."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "kernel": jax.random.normal(keys[0], (8, 16)),
        "table": jax.random.normal(keys[1], (16, 8), jnp.bfloat16),
        "blocks": [jnp.full((8,), jnp.inf), jnp.arange(8.0) / 3],
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(
            optax.scale_by_adam(), {"kernel": True, "table": False, "blocks": [False, True]}
        ),
        optax.inject_hyperparams(optax.sgd)(0.1),
    )
    return {"params": params, "opt": tx.init(params), "step": jnp.int32(7)}


def shardings(state, mesh):
    """Axis 0 over the mesh's first axis, axis 1 over its second, scalars everywhere."""
    axes = mesh.axis_names
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*axes[: x.ndim])), state)


def abstract(state, mesh=None):
    mesh = mesh_of(8) if mesh is None else mesh
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings(state, mesh),
    )


def assert_same(actual, expected):
    """Bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(folder, *steps, keep_last=5):
    """Saves these steps, each from a seed of its own; returns the states."""
    states = {step: train_state(step) for step in steps}
    with Checkpoints(folder, keep_last=keep_last) as checkpoints:
        for step, state in states.items():
            placed = jax.device_put(state, shardings(state, mesh_of(8)))
            assert checkpoints.save(step, placed)
    return states


def damage(path: Path, truncate: bool):
    """Removes a file or folder, or cuts a file in half."""
    if path.is_dir():
        shutil.rmtree(path)
    elif truncate:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
