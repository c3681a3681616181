"""A bit that flips in any file of a checkpoint is noticed, and older checkpoints still load."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import FIXTURES

import train
from train.checkpoint import digests, old_layouts, store, warm_start
from train.logging import jsonl

OLD = FIXTURES / "old_checkpoint"
"""Four steps of AdamW, saved by a version without digests."""
OLD_SOPHIA = OLD.with_name("old_sophia")
"""Four steps of Sophia-G, by a version whose state had fewer counters."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with store.Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"step": step})
    return folder


def state(step):
    keys = jax.random.split(jax.random.key(step), 2)
    return {
        "step": jnp.int32(step),
        "w": jax.random.normal(keys[0], (40, 100)),
        "m": jax.random.normal(keys[1], (40, 100), jnp.bfloat16),
    }


def restored(folder):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state(0))
    with store.Checkpoints(folder) as checkpoints:
        return *checkpoints.restore(target), checkpoints.notes


def flip(path, rng):
    """Changes one random bit."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("flips", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_each_flipped_bit_is_noticed_and_the_step_before_taken(folder, tmp_path, flips, record):
    """In each file in turn, at a random place; nothing but the digests is read before."""
    rng, noticed = random.Random(0), 0
    files = sorted(path for path in (folder / "2").rglob("*") if path.stat().st_size)
    files = [path.relative_to(folder) for path in files if path.is_file()]
    assert {"digests.json", "_METADATA"} < {path.name for path in files}
    for number in range(flips):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        flip(copy / (files[number % len(files)] if flips > 6 else rng.choice(files)), rng)
        step, found, notes = restored(copy)
        same = np.array_equal(found["w"], state(1)["w"])
        noticed += step == 1 and same and "step 2 is damaged" in notes[0]
    record("flipped bits noticed", f"{noticed} of {flips}")
    assert noticed == flips


@pytest.fixture
def record(record_property, capsys):
    def note(name, value):
        record_property(name, value)
        with capsys.disabled():
            print(f"\n{name}: {value}")

    return note


def test_a_sound_checkpoint_is_taken_in_silence(folder):
    step, found, notes = restored(folder)
    assert (step, notes) == (2, [])
    np.testing.assert_array_equal(found["w"], state(2)["w"])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": 3}', '{"sha256": {"a": "b"}}'])
def test_digests_that_make_no_sense_count_as_damage(folder, tmp_path, text):
    shutil.copytree(folder / "2", tmp_path / "2")
    (tmp_path / "2" / digests.FILE).write_text(text)
    assert digests.fault(tmp_path / "2")


def test_files_are_on_the_disk_before_their_digests(folder, tmp_path, monkeypatch):
    copy, events, replace = tmp_path / "2", [], digests.files.replace_text
    shutil.copytree(folder / "2", copy)
    (copy / digests.FILE).unlink()

    def replaced(path, text):
        events.append(path)
        replace(path, text)

    monkeypatch.setattr(digests.files, "sync", events.append)
    monkeypatch.setattr(digests.files, "replace_text", replaced)
    digests.write(copy)
    *synced, last = events
    assert last == copy / digests.FILE
    assert set(synced) == {path for path in copy.rglob("*") if path.is_file()} - {last}


def test_a_save_that_was_cut_before_its_digests_is_gone_on_from_and_said(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "2" / digests.FILE).unlink()
    step, _, notes = restored(tmp_path / "cut")
    assert step == 2 and notes[0].startswith("step 2 has no digests")


def test_a_run_of_an_older_version_goes_on_and_says_that_it_has_no_digests(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    before = jsonl.read_history(run)
    history = train.resume(run, steps=6, compile_cache="")
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert history[: len(before)] == before
    assert "step 4 has no digests" in capsys.readouterr().out
    assert digests.fault(run / "checkpoints" / "6") == ""
    assert warm_start.load(run).notes == ()


def test_the_state_of_an_older_version_is_read_in_todays_layout(tmp_path):
    """Sophia's counters of samples of 0 came later; curvature and momentum go on as they were."""
    run = tmp_path / "run"
    shutil.copytree(OLD_SOPHIA, run)
    accepted = [r["hessian_accepted"] for r in jsonl.read_history(run) if "loss" in r][-1]
    history = train.resume(run, steps=6, compile_cache="")
    steps = [row for row in history if "loss" in row]
    assert [row["step"] for row in steps][-2:] == [4, 6]
    assert steps[-1]["hessian_accepted"] == accepted + 1
    assert steps[-1]["hessian_zero_samples"] == steps[-1]["momentum_nonfinite_leaves"] == 0
    train.resume(run, steps=8, compile_cache="")
    assert warm_start.load(run).step == 8


def test_leaves_are_found_under_the_names_that_an_older_version_gave_them():
    """A prediction of `clip_by_ratio` had no container of its own; a parameter may be so named."""
    saved = {"inner": {"linear": 1, "quadratic": 2}, "params": {"linear": 3}}
    prediction = {"linear": "a", "quadratic": "b"}
    wanted = {"inner": {"predicted_reduction": prediction}, "params": {"linear": "c"}}
    target = {"inner": prediction, "params": {"linear": "c"}}
    loaded = {"inner": {"predicted_reduction": {"linear": 1, "quadratic": 2}}} | {
        "params": saved["params"]
    }
    assert old_layouts.is_older(saved, wanted) and not old_layouts.is_older(loaded, wanted)
    assert old_layouts.in_older_layout(saved, wanted) == target
    assert old_layouts.in_this_layout(saved, wanted, {}) == loaded
    assert old_layouts.in_this_layout(loaded, wanted, {}) == loaded


def test_a_damaged_step_keeps_no_other_from_being_read_or_saved(tmp_path):
    """Orbax reads the description of each step before it writes one."""
    run, name = tmp_path / "run", "_CHECKPOINT_METADATA"
    shutil.copytree(OLD, run)
    train.resume(run, steps=6, compile_cache="")
    (run / "checkpoints" / "4" / name).write_text('{"loss": ')
    assert warm_start.load(run).step == 6
    train.resume(run, steps=8, compile_cache="")
    (aside,) = (run / "checkpoints").glob("damaged-*")
    assert (aside / name).read_text() == '{"loss": '
    assert sorted(path.name for path in aside.parent.iterdir()) == ["6", "8", aside.name]
    shutil.rmtree(run / "checkpoints" / "6")
    (run / "checkpoints" / "8" / name).write_text("{}")
    with pytest.raises(store.CheckpointError, match=r"holds no checkpoint \(step 8 is"):
        train.resume(run, steps=9, compile_cache="")


def test_damaged_metrics_of_an_older_version_cost_no_checkpoint(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    (run / "checkpoints" / "4" / "metrics" / "metrics").write_text('{"loss": ')
    assert warm_start.load(run).step == 4
    history = train.resume(run, steps=5, compile_cache="")
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"step": 4}, "manifest of a checkpoint .*KeyError: 'config'"),
        ({"step": 4, "config": 3}, "manifest of a checkpoint .* unexpected form"),
        (3, "step 4 is unreadable"),
    ],
)
def test_a_manifest_of_another_form_is_named(tmp_path, fields, words):
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    path = run / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": fields}))
    with pytest.raises((ValueError, store.CheckpointError), match=words):
        train.resume(run, steps=6, compile_cache="")
