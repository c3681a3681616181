"""Checkpoints on a bad disk: damaged files, full disks, odd paths, what a killed run left."""

import gc
import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from saved_states import abstract, assert_same, damage, saved

from train.checkpoint import store
from train.checkpoint.errors import CheckpointError
from train.checkpoint.store import Checkpoints


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


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
    with Checkpoints(folder) as checkpoints:
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
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match=rf"{words}.*\); nor can the others be read"),
    ):
        checkpoints.restore(abstract(states[20]))


def test_repair_clears_what_was_half_written(folder, tmp_path):
    """Whatever it is; what a link leads to stays."""
    states = saved(folder, 10)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (folder / "30.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "40.orbax-checkpoint-tmp").touch()
    (folder / "50.orbax-checkpoint-tmp").symlink_to(tmp_path / "precious")
    with Checkpoints(folder) as checkpoints:
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
        Checkpoints(folder) as checkpoints,
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
    with Checkpoints(folder) as checkpoints:
        step, state = checkpoints.restore(abstract(states[20]))
    assert step == 20 and str(folder) in checkpoints.notes[0]
    assert_same(state, states[20])
    assert {p.name for p in tmp_path.iterdir()} == {"l", "axb", "qx", "back", name}
    assert {p.name for p in (tmp_path / "back").iterdir()} == {"checkpoints"}


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
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state)
    with pytest.raises(CheckpointError, match=r"(failed|not saved) .*; check free space"):
        checkpoints.close() if at_close else checkpoints.save(2, state)
    assert checkpoints.latest is None
    small = {"w": jnp.ones(3)}
    assert at_close or checkpoints.save(1, small)  # the step whose save failed
    checkpoints.close()


def test_digests_that_cannot_be_written_are_a_failed_save(folder, monkeypatch):
    def full(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(store.digests, "write", full)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"w": jnp.ones(3)})
    with pytest.raises(CheckpointError, match=r"the last save failed .*No space left"):
        checkpoints.close()


def test_no_file_of_a_checkpoint_is_a_pickle(folder):
    saved(folder, 10)
    for file in filter(Path.is_file, folder.rglob("*")):
        data = file.read_bytes()
        assert not (data[:1] == b"\x80" and data[-1:] == b"."), file  # as pickles begin and end
