"""The manifest beside a checkpoint is compared with the run that goes on from it."""

import pytest

from train.checkpoint import manifest
from train.logging.throughput import Health

CONFIG = {"optim": {"gamma": 0.05, "betas": (0.9, 0.99)}, "steps": 10, "mesh": {"fsdp": 1}}


def made(**changes):
    return manifest.make(4, CONFIG, "abc", Health()) | changes


def test_a_run_goes_on_in_silence_where_nothing_changed():
    other = CONFIG | {
        "steps": 20,
        "mesh": {"fsdp": 2},
        "optim": {"gamma": 0.05, "betas": [0.9, 0.99]},
    }
    assert manifest.check(made(), other, "abc") == []


@pytest.mark.parametrize(
    ("config", "fingerprint", "words"),
    [
        (
            CONFIG | {"optim": {"gamma": 0.1, "betas": (0.9, 0.99)}},
            "abc",
            "optim.gamma 0.05 -> 0.1",
        ),
        (CONFIG, "xyz", "data abc -> xyz"),
        (CONFIG, "", "data abc -> unknown"),
    ],
)
def test_another_config_or_other_data_are_refused_or_noted(config, fingerprint, words):
    with pytest.raises(ValueError, match=rf"checkpoint of step 4: {words}\. .*--allow-changes"):
        manifest.check(made(), config, fingerprint)
    notes = manifest.check(made(), config, fingerprint, allow_changes=True)
    assert notes == [f"changed since the checkpoint: {words}"]


def test_other_libraries_are_noted():
    older = made(versions=manifest.versions() | {"jax": "0.1"})
    (note,) = manifest.check(older, CONFIG, "abc")
    assert note.startswith("another version since the checkpoint: jax 0.1 -> ")


def test_a_checkpoint_without_a_manifest_is_noted():
    assert "not compared" in manifest.check({}, CONFIG, "abc")[0]


@pytest.mark.parametrize("name", ["refresh_pending", "owed"])
def test_the_health_is_read_also_under_its_old_name(name):
    fields = {"skipped": 3, "in_a_row": 1, name: True}
    assert manifest.health(made(health=fields)) == Health(3, 1, True)
    assert manifest.health(made()) == manifest.health({}) == Health()
