import dataclasses
import re

import jax
import numpy as np
import pytest

from models import DecoderConfig
from train import program
from train.config import preset
from train.mesh import MeshConfig, make_mesh

MODEL = DecoderConfig(vocab_size=256, context=16, width=32, layers=1, heads=2)
LOSSES = {}


def run_on(optimizer, mesh, devices=None, **changes):
    run = preset("tiny", optimizer)
    optim = dataclasses.replace(run.optim, **changes)
    shape = {"model": MODEL, "sequence_length": 16, "warmup_steps": 2}
    run = dataclasses.replace(run, optim=optim, mesh=mesh, **shape)
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


@pytest.mark.parametrize(
    ("optimizer", "refresh", "changes"),
    [
        ("adamw", None, {}),
        ("sophia-g", True, {}),
        ("sophia-g", True, {"groups": 8}),
        ("sophia-g", True, {"groups": 0}),
        ("sophia-g", True, {"groups": 8, "batch_fraction": 0.5}),
        ("sophia-h", True, {"groups": 1}),
        ("sophia-h", True, {"groups": 2}),
    ],
)
def test_parameters_move_and_rows_stay(optimizer, refresh, changes):
    """Each matrix is gathered for its use, as in a plain step; activations never are exchanged."""
    text = run_on(optimizer, MeshConfig(fsdp=4), **changes)[1].compile(refresh).as_text()
    gathers = len(re.findall(r" all-gather\(", text))
    matrices = 8  # embedding, positions and six of the block
    passes = 2 if optimizer == "sophia-h" or "batch_fraction" in changes else 1
    passes += optimizer == "sophia-h" and changes["groups"] > 1  # the gradient is a pass apart
    assert 0 < gathers <= matrices * passes + 1
    assert "all-to-all(" not in text and "collective-permute(" not in text


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h", "adamw", "lion", "muon"])
def test_optimizer_state_is_sharded_like_its_parameters(optimizer):
    state = run_on(optimizer, MeshConfig(fsdp=4))[1].init()
    matrices = {
        jax.tree_util.keystr(path): x.sharding.spec
        for path, x in jax.tree.leaves_with_path(state.params)
        if x.ndim == 2
    }
    assert all("fsdp" in spec for spec in matrices.values())
    found = 0
    for path, x in jax.tree.leaves_with_path(state.opt_state):
        for parameter, spec in matrices.items():
            if jax.tree_util.keystr(path).endswith(parameter):
                found += 1
                assert x.sharding.spec == spec
                assert x.addressable_shards[0].data.size == x.size // 4
    assert found >= len(matrices)


@pytest.mark.parametrize("shape", [MeshConfig(3, 2), MeshConfig(0, 3), MeshConfig(4, 1)])
def test_a_mesh_that_leaves_devices_over_is_refused(shape):
    with pytest.raises(ValueError, match="does not use 8 devices exactly"):
        make_mesh(shape)


def test_parameters_that_do_not_divide_over_fsdp_are_refused():
    run = dataclasses.replace(preset(), mesh=MeshConfig(fsdp=3), batch_size=12)
    with pytest.raises(ValueError, match=r"--mesh\.fsdp 3 does not divide the model's width of 64"):
        program.assemble(run, jax.devices()[:3])


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    with pytest.raises(ValueError, match="batch_size=12 does not divide over 8 devices"):
        program.assemble(dataclasses.replace(preset(), batch_size=12))
