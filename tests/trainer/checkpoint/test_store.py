"""Laws of checkpoints: exact round trips onto any mesh, safe under donation, errors with a cure."""

import gc
import os
import resource
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.checkpoint.store import CheckpointError, Checkpoints


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
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def saved(folder, *steps, interval=10, keep_last=5):
    """A folder with these steps, each of another seed; returns the states."""
    states = {step: train_state(step) for step in steps}
    with Checkpoints(folder, save_interval=interval, keep_last=keep_last) as checkpoints:
        for step, state in states.items():
            placed = jax.device_put(state, shardings(state, mesh_of(8)))
            assert checkpoints.save(step, placed)
    return states


@pytest.mark.parametrize("shape", [(8,), (2, 4), (1,)])
def test_restore_is_exact_onto_any_mesh(folder, shape):
    states = saved(folder, 10)
    target = abstract(states[10], mesh_of(*shape))
    with Checkpoints(folder, save_interval=10) as checkpoints:
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
    with Checkpoints(folder, save_interval=1) as checkpoints:
        for step in range(1, 4):
            expected = np.full((1 << 20,), 3.0 - 2 * step, np.float32)
            checkpoints.save(step, state)
            state = jax.block_until_ready(overwrite(state))
            np.testing.assert_array_equal(checkpoints.restore(target)[1]["w"], expected)


def test_save_returns_before_the_files_are_there(folder):
    state = {"w": jnp.zeros((1 << 22,))}
    early = []
    with Checkpoints(folder, save_interval=1, keep_last=9) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, state)
            early.append(not (folder / str(step)).exists())
            assert (folder / str(step - 1)).exists() or step == 1  # one save at a time
    assert any(early)  # all, but that a busy machine may stop this thread for long
    assert (folder / "4").exists()


def test_saves_fall_on_the_interval_or_are_forced(folder):
    state = train_state()
    with Checkpoints(folder, save_interval=10, keep_last=9) as checkpoints:
        assert checkpoints.latest is None
        assert not folder.exists()  # a mistyped folder is not made by looking into it
        assert [step for step in range(1, 31) if checkpoints.save(step, state)] == [10, 20, 30]
        assert checkpoints.save(33, state, force=True)
        assert not checkpoints.save(33, state, force=True)  # the same state twice
        assert checkpoints.latest == 33
        assert checkpoints.steps == [10, 20, 30, 33]


@pytest.mark.parametrize("reopen", [False, True])
def test_the_last_and_the_best_are_kept(folder, reopen):
    losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: None, 50: 2.0, 60: 1.5}
    state = train_state()
    checkpoints = Checkpoints(folder, save_interval=10, keep_last=2)
    for step, loss in losses.items():
        checkpoints.save(step, state)
        if loss is not None:
            checkpoints.losses[step] = loss  # known when the save has long begun
        if reopen:
            checkpoints.close()
            known = checkpoints.losses
            checkpoints = Checkpoints(folder, save_interval=10, keep_last=2)
            checkpoints.losses.update(known)
    checkpoints.close()
    assert sorted(int(p.name) for p in folder.iterdir()) == [20, 50, 60]


def test_going_back_to_an_older_step_replaces_the_later_ones(folder):
    states = saved(folder, 10, 20, 30)
    with Checkpoints(folder, save_interval=10, keep_last=2) as checkpoints:
        step, state = checkpoints.restore(abstract(states[10]), step=10)
        assert not checkpoints.save(step, state, force=True)
        assert checkpoints.steps == [10, 20, 30]  # reading alone deletes nothing
        assert checkpoints.save(20, state)
        assert checkpoints.steps == [10, 20]
        assert_same(checkpoints.restore(abstract(state))[1], states[10])


def test_a_new_run_does_not_overwrite_another(folder):
    saved(folder, 10, 20)
    with (
        Checkpoints(folder, save_interval=10) as checkpoints,
        pytest.raises(CheckpointError, match=r"\[10, 20\] of another run: resume that run, or"),
    ):
        checkpoints.save(10, train_state())
    assert sorted(os.listdir(folder)) == ["10", "20"]


def test_missing_folder_and_missing_steps_are_named(folder):
    target = abstract(train_state())
    with Checkpoints(folder, save_interval=10) as checkpoints:
        with pytest.raises(CheckpointError, match="checkpoints does not exist"):
            checkpoints.restore(target)
        assert not folder.exists()
        folder.mkdir()
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpoints.restore(target)
    saved(folder, 10, 20)
    with (
        Checkpoints(folder, save_interval=10) as checkpoints,
        pytest.raises(CheckpointError, match=r"no step 15: restore one of \[10, 20\]"),
    ):
        checkpoints.restore(target, step=15)


def test_a_part_of_what_was_saved_is_read_alone(folder):
    """Not the optimizer's state, though it is another one, nor step."""
    states = saved(folder, 10)
    target = {"params": abstract(states[10])["params"]}
    with Checkpoints(folder, save_interval=10) as checkpoints:
        assert_same(checkpoints.restore(target, part=True)[1], {"params": states[10]["params"]})
        with pytest.raises(CheckpointError, match=r"opt/.* is .* on disk and absent here"):
            checkpoints.restore(target)
        target["params"]["other"] = target["params"]["kernel"]
        with pytest.raises(CheckpointError, match="params/other is absent on disk and float32"):
            checkpoints.restore(target, part=True)


def test_a_state_that_is_wrong_counts_as_damaged(folder):
    states = saved(folder, 10, 20)
    with Checkpoints(folder, save_interval=10) as checkpoints:

        def wrong(step, state):
            same = state["params"]["kernel"][0, 0] == states[10]["params"]["kernel"][0, 0]
            return "" if same else f"it is not that of step {step}"

        step, state = checkpoints.restore(abstract(states[20]), wrong=wrong)
        assert step == 10
        assert_same(state, states[10])
        assert "step 20 is damaged (it is not that of step 20)" in checkpoints.notes[0]


@pytest.mark.parametrize(
    "pattern", ["state", "state/_METADATA", "state/manifest.ocdbt", "state/d/*"]
)
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("digests", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    folder, pattern, truncate, digests, capfd
):
    """Also one without digests, of which Orbax finds out; it leaves reads unfinished, unseen."""
    states = saved(folder, 10, 20, 30)
    for file in (folder / "30").glob(pattern):
        damage(file, truncate)
    if not digests:
        (folder / "30" / "digests.json").unlink()
    with Checkpoints(folder, save_interval=10) as checkpoints:
        what = "damaged" if digests else "unreadable"
        with pytest.raises(CheckpointError, match=rf"step 30 is {what} .*\[10, 20\].* --step"):
            checkpoints.restore(abstract(states[30]), step=30)
        step, state = checkpoints.restore(abstract(states[20]))
        assert step == 20
        assert_same(state, states[20])
        assert f"step 30 is {what}" in checkpoints.notes[0]
        assert checkpoints.notes[1] == "going on from step 20 instead"
        assert checkpoints.save(30, states[20])  # and the run can go on over the damaged one
        assert_same(checkpoints.restore(abstract(states[30]))[1], states[20])
    gc.collect()  # the reads left unfinished are to be found here
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("digests", [True, False])
def test_where_all_are_damaged_the_newest_is_named(folder, digests):
    states = saved(folder, 10, 20)
    for step in (10, 20):
        damage(folder / str(step) / "state" / "manifest.ocdbt", truncate=False)
        if not digests:
            (folder / str(step) / "digests.json").unlink()
    words = f"step 20 is {'damaged' if digests else 'unreadable'} "
    with (
        Checkpoints(folder, save_interval=10) as checkpoints,
        pytest.raises(CheckpointError, match=rf"{words}.*\); nor can the others be read"),
    ):
        checkpoints.restore(abstract(states[20]))


def test_what_stands_beside_the_arrays_is_shown_before_they_are_read(folder):
    state, seen = train_state(), []
    with Checkpoints(folder, save_interval=10) as checkpoints:
        checkpoints.save(10, state, record={"step": 10, "config": {"gamma": 0.1, "axes": [1, 2]}})
    with Checkpoints(folder, save_interval=10) as checkpoints:
        checkpoints.restore(abstract(state), accept=seen.append)
        assert (
            seen == [checkpoints.record] == [{"step": 10, "config": {"gamma": 0.1, "axes": [1, 2]}}]
        )

        def refuse(record):
            raise ValueError("another config")

        with pytest.raises(ValueError, match="another config"):
            checkpoints.restore(abstract(state), accept=refuse)


def test_no_file_of_a_checkpoint_is_a_pickle(folder):
    saved(folder, 10)
    for file in filter(Path.is_file, folder.rglob("*")):
        data = file.read_bytes()
        assert not (data[:1] == b"\x80" and data[-1:] == b"."), file  # as pickles begin and end


def test_repair_clears_what_was_half_written(folder, tmp_path):
    """Whatever it is; what a link leads to stays."""
    states = saved(folder, 10)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (folder / "30.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "40.orbax-checkpoint-tmp").touch()
    (folder / "50.orbax-checkpoint-tmp").symlink_to(tmp_path / "precious")
    with Checkpoints(folder, save_interval=10) as checkpoints:
        checkpoints.repair()
        assert checkpoints.restore(abstract(states[10]))[0] == 10
    assert os.listdir(folder) == ["10"] and (tmp_path / "precious" / "file").exists()


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_has_a_steps_name_and_is_no_folder_is_named(folder, kind, tmp_path):
    states = saved(folder, 10)
    if kind == "file":
        (folder / "20").touch()
    else:
        (folder / "20").symlink_to(folder / "10" if kind == "link" else tmp_path / "nowhere")
    with (
        Checkpoints(folder, save_interval=10) as checkpoints,
        pytest.raises(CheckpointError, match=rf"20 is a {kind[-4:]} where .* move it away"),
    ):
        checkpoints.restore(abstract(states[10]))


NAMES = ["[lr=.01]", "[!a]*", "a*b", "q?", "back\\slash", "per%cent", "ünï", "ha#sh", "-x"]


@pytest.mark.parametrize("name", [*NAMES, "sp ace"])
def test_a_path_of_any_characters_means_itself(tmp_path, name):
    """Beside others that it would match as a pattern, and nothing is written outside of it."""
    for other in ("l", "axb", "qx", "back"):
        saved(tmp_path / other / "checkpoints", 10)
    folder = tmp_path / name / "checkpoints"
    states = saved(folder, 20, 30)
    damage(folder / "30" / "state" / "d", truncate=False)
    with Checkpoints(folder, save_interval=10) as checkpoints:
        step, state = checkpoints.restore(abstract(states[20]))
    assert step == 20 and str(folder) in checkpoints.notes[0]
    assert_same(state, states[20])
    assert {p.name for p in tmp_path.iterdir()} == {"l", "axb", "qx", "back", name}
    assert {p.name for p in (tmp_path / "back").iterdir()} == {"checkpoints"}


def damage(path: Path, truncate: bool):
    if path.is_dir():
        shutil.rmtree(path)
    elif truncate:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()


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
        Checkpoints(folder, save_interval=10) as checkpoints,
        pytest.raises(CheckpointError, match=rf"{folder} .*{names}.* settings of that run"),
    ):
        checkpoints.restore(abstract(change(states[10])))


@pytest.fixture
def full_disk():
    """Writing past 1 MB in one file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("at_close", [True, False])
def test_a_failed_save_is_reported_by_the_next_call_and_can_be_repeated(
    folder, full_disk, at_close
):
    state = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
    checkpoints = Checkpoints(folder, save_interval=1)
    checkpoints.save(1, state)
    with pytest.raises(CheckpointError, match=r"(failed|not saved) .*; check free space"):
        checkpoints.close() if at_close else checkpoints.save(2, state)
    assert checkpoints.latest is None
    small = {"w": jnp.ones(3)}
    assert at_close or checkpoints.save(1, small)  # the step whose save failed
    checkpoints.close()


@pytest.mark.parametrize("wrong", [{"save_interval": 0}, {"save_interval": 1, "keep_last": 0}])
def test_policies_must_be_positive(folder, wrong):
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(folder, **wrong)


def event_loops():
    """Open files and threads of those that wait for saves."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    polls = sum("eventpoll" in os.readlink(link) for link in links if os.path.islink(link))
    return polls, sum("_run_loop" in thread.name for thread in threading.enumerate())


def test_saves_leave_no_threads_and_no_open_files(folder):
    state, before = train_state(0), event_loops()
    with Checkpoints(folder, save_interval=1, keep_last=1) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, jax.device_put(state, shardings(state, mesh_of(8))))
    assert event_loops() == before
