"""Checkpoints: exact round trips onto any mesh, safe under donation, errors with a cure."""

import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from saved_states import abstract, assert_same, mesh_of, saved, shardings, train_state

from train.checkpoint.errors import CheckpointError
from train.checkpoint.store import Checkpoints


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("shape", [(8,), (2, 4), (1,)])
def test_restore_is_exact_onto_any_mesh(folder, shape):
    states = saved(folder, 10)
    target = abstract(states[10], mesh_of(*shape))
    with Checkpoints(folder) as checkpoints:
        step, state = checkpoints.restore(target)
    assert step == 10
    assert_same(state, states[10])
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)


def test_donating_the_state_after_save_does_not_reach_the_checkpoint(folder):
    mesh = mesh_of(8)
    state = jax.device_put({"w": jnp.ones((1 << 20,))}, NamedSharding(mesh, PartitionSpec("data")))
    target = abstract(state, mesh)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x - 2, s), donate_argnums=0)
    with Checkpoints(folder) as checkpoints:
        for step in range(1, 4):
            expected = np.full((1 << 20,), 3.0 - 2 * step, np.float32)
            checkpoints.save(step, state)
            state = jax.block_until_ready(overwrite(state))
            np.testing.assert_array_equal(checkpoints.restore(target)[1]["w"], expected)


def test_save_returns_before_the_files_are_there(folder):
    state = {"w": jnp.zeros((1 << 22,))}
    early = []
    with Checkpoints(folder, keep_last=9) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, state)
            early.append(not (folder / str(step)).exists())
            assert (folder / str(step - 1)).exists() or step == 1  # one save at a time
    assert any(early)  # all, but that a busy machine may stop this thread for long
    assert (folder / "4").exists()


def test_a_state_is_saved_once_and_looking_makes_no_folder(folder):
    state = train_state()
    with Checkpoints(folder, keep_last=9) as checkpoints:
        assert checkpoints.latest is None
        assert not folder.exists()  # a mistyped folder is not made by looking into it
        assert [step for step in (10, 20, 20, 33) if checkpoints.save(step, state)] == [10, 20, 33]
        assert not checkpoints.save(33, state)
        assert checkpoints.latest == 33
        assert checkpoints.steps == [10, 20, 33]


@pytest.mark.parametrize("reopen", [False, True])
def test_the_last_and_the_best_are_kept(folder, reopen):
    losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: None, 50: 2.0, 60: 1.5}
    state = train_state()
    checkpoints = Checkpoints(folder, keep_last=2)
    for step, loss in losses.items():
        checkpoints.save(step, state)
        if loss is not None:
            checkpoints.losses[step] = loss  # known when the save has long begun
        if reopen:
            checkpoints.close()
            known = checkpoints.losses
            checkpoints = Checkpoints(folder, keep_last=2)
            checkpoints.losses.update(known)
    checkpoints.close()
    assert sorted(int(p.name) for p in folder.iterdir()) == [20, 50, 60]


def test_going_back_to_an_older_step_replaces_the_later_ones(folder):
    states = saved(folder, 10, 20, 30)
    with Checkpoints(folder, keep_last=2) as checkpoints:
        step, state = checkpoints.restore(abstract(states[10]), step=10)
        assert not checkpoints.save(step, state)
        assert checkpoints.steps == [10, 20, 30]  # reading alone deletes nothing
        assert checkpoints.save(20, state)
        assert checkpoints.steps == [10, 20]
        assert_same(checkpoints.restore(abstract(state))[1], states[10])


def test_a_new_run_does_not_overwrite_another(folder):
    saved(folder, 10, 20)
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match=r"\[10, 20\] of another run: resume that run, or"),
    ):
        checkpoints.save(10, train_state())
    assert sorted(os.listdir(folder)) == ["10", "20"]


def test_missing_folder_and_missing_steps_are_named(folder):
    target = abstract(train_state())
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(CheckpointError, match="checkpoints does not exist"):
            checkpoints.restore(target)
        assert not folder.exists()
        folder.mkdir()
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpoints.restore(target)
    saved(folder, 10, 20)
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match=r"no step 15: restore one of \[10, 20\]"),
    ):
        checkpoints.restore(target, step=15)


def test_a_part_of_what_was_saved_is_read_alone(folder):
    """Not the optimizer's state, though it is another one, nor step."""
    states = saved(folder, 10)
    target = {"params": abstract(states[10])["params"]}
    with Checkpoints(folder) as checkpoints:
        assert_same(checkpoints.restore(target, part=True)[1], {"params": states[10]["params"]})
        with pytest.raises(CheckpointError, match=r"opt/.* is .* on disk and absent here"):
            checkpoints.restore(target)
        target["params"]["other"] = target["params"]["kernel"]
        with pytest.raises(CheckpointError, match="params/other is absent on disk and float32"):
            checkpoints.restore(target, part=True)


def test_a_state_that_is_wrong_counts_as_damaged(folder):
    states = saved(folder, 10, 20)
    with Checkpoints(folder) as checkpoints:

        def wrong(step, state):
            same = state["params"]["kernel"][0, 0] == states[10]["params"]["kernel"][0, 0]
            return "" if same else f"it is not that of step {step}"

        step, state = checkpoints.restore(abstract(states[20]), wrong=wrong)
        assert step == 10
        assert_same(state, states[10])
        assert "step 20 is damaged (it is not that of step 20)" in checkpoints.notes[0]


def test_what_stands_beside_the_arrays_is_shown_before_they_are_read(folder):
    state, seen = train_state(), []
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(10, state, manifest={"step": 10, "config": {"gamma": 0.1, "axes": [1, 2]}})
    with Checkpoints(folder) as checkpoints:
        checkpoints.restore(abstract(state), accept=seen.append)
        assert (
            seen
            == [checkpoints.manifest]
            == [{"step": 10, "config": {"gamma": 0.1, "axes": [1, 2]}}]
        )

        def refuse(manifest):
            raise ValueError("another config")

        with pytest.raises(ValueError, match="another config"):
            checkpoints.restore(abstract(state), accept=refuse)


def wider(state):
    return state | {"params": state["params"] | {"kernel": jnp.zeros((8, 32))}}


def narrower_dtype(state):
    return state | {"params": state["params"] | {"kernel": jnp.zeros((8, 16), jnp.bfloat16)}}


def another_optimizer(state):
    return state | {"opt": optax.sgd(0.1, momentum=0.9).init(state["params"])}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (wider, r"params/kernel is float32\[8, 16\] on disk and float32\[8, 32\] here"),
        (narrower_dtype, r"params/kernel is float32\[8, 16\] on disk and bfloat16"),
        (another_optimizer, r"opt/0/trace/.* is absent on disk"),
    ],
)
def test_another_model_or_optimizer_is_named(folder, change, names):
    states = saved(folder, 10)
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match=rf"{folder} .*{names}.* settings of that run"),
    ):
        checkpoints.restore(abstract(change(states[10])))


def test_a_checkpoint_at_least_is_kept(folder):
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(folder, keep_last=0)


def event_loops():
    """Open files and threads of those that wait for saves."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    polls = sum("eventpoll" in os.readlink(link) for link in links if os.path.islink(link))
    return polls, sum("_run_loop" in thread.name for thread in threading.enumerate())


def test_saves_leave_no_threads_and_no_open_files(folder):
    state, before = train_state(0), event_loops()
    with Checkpoints(folder, keep_last=1) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, jax.device_put(state, shardings(state, mesh_of(8))))
    assert event_loops() == before
