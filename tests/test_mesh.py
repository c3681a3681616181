import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from train import program
from train.config import preset
from train.mesh import MeshConfig, make_mesh

CURVATURE = ("sophia-g", "sophia-h")
LOSSES = {}


def run_on(optimizer, mesh, devices=None, **changes):
    run = preset("tiny", optimizer)
    optim = dataclasses.replace(run.optim, **changes)
    run = dataclasses.replace(run, optim=optim, mesh=mesh, warmup_steps=2)
    return run, program.assemble(run, devices)


def ten_losses(run, programs):
    """Losses of the first ten steps, with samples of curvature at steps 0, 3, 6 and 9."""
    state, losses = programs.init(), []
    for step in range(10):
        state, metrics = programs.step(state, programs.batch(step), refresh=step % 3 == 0)
        losses.append(float(metrics["loss"]))
    return state, np.array(losses)


def on_one_device(optimizer, **changes):
    key = (optimizer, *changes.items())
    if key not in LOSSES:
        run, programs = run_on(optimizer, MeshConfig(), jax.devices()[:1], **changes)
        LOSSES[key] = ten_losses(run, programs)[1]
    return LOSSES[key]


@pytest.mark.parametrize("fsdp", [1, 4, 8])
@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [("sophia-g", {}), ("sophia-g", {"groups": 8}), ("sophia-h", {})],
    ids=["sophia-g", "sophia-g in groups", "sophia-h"],
)
def test_eight_devices_follow_one(optimizer, changes, fsdp):
    run, programs = run_on(optimizer, MeshConfig(fsdp=fsdp), **changes)
    state, losses = ten_losses(run, programs)
    np.testing.assert_allclose(losses, on_one_device(optimizer, **changes), rtol=1e-5)
    assert programs.step._cache_size() == 2, "one program for plain steps, one for refreshes"
    placed = jax.tree.map(lambda x: x.sharding, state)
    assert placed == jax.tree.map(lambda x: x.sharding, programs.abstract)


@pytest.mark.parametrize("optimizer", [*CURVATURE, "adamw", "lion", "muon"])
def test_optimizer_state_is_sharded_like_its_parameters(optimizer):
    _, programs = run_on(optimizer, MeshConfig(fsdp=4))
    state = programs.init()
    shapes = {x.shape: x.sharding.spec for x in jax.tree.leaves(state.params) if x.ndim == 2}
    matrices = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 2]
    assert len(matrices) >= len([x for x in jax.tree.leaves(state.params) if x.ndim == 2])
    for x in matrices:
        assert x.sharding.spec == shapes[x.shape] != P()
        assert x.addressable_shards[0].data.size == x.size // 4


@pytest.mark.parametrize("shape", [MeshConfig(3, 2), MeshConfig(0, 3), MeshConfig(4, 1)])
def test_a_mesh_that_leaves_devices_over_is_refused(shape):
    with pytest.raises(ValueError, match="does not use 8 devices exactly"):
        make_mesh(shape)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    with pytest.raises(ValueError, match="batch_size=12 does not divide over 8 devices"):
        program.assemble(dataclasses.replace(preset(), batch_size=12))
