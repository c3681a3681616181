"""The first signal asks, the second ends; what stands beside a checkpoint is compared."""

import signal
import subprocess
import sys

import pytest

from train.checkpoint import manifest
from train.logging.throughput import Health
from train.parallel import signals

CONFIG = {"optim": {"gamma": 0.05, "betas": (0.9, 0.99)}, "steps": 10, "mesh": {"fsdp": 1}}


@pytest.mark.parametrize("first", signals.SIGNALS)
@pytest.mark.parametrize("second", signals.SIGNALS)
def test_the_second_signal_ends_a_process_at_once(first, second):
    """Whatever it is doing: the action is the system's, not Python's."""
    code = (
        "import time; from train.parallel import signals\n"
        "with signals.stopping() as stop:\n"
        "  print('ready', flush=True)\n"
        "  stop.wait(); print('stopping', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(second)
    process.communicate(timeout=60)
    assert process.returncode == -second


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.stopping() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


def saved(**changes):
    return manifest.make(4, CONFIG, "abc", Health()) | changes


def test_a_run_goes_on_in_silence_where_nothing_changed():
    other = CONFIG | {
        "steps": 20,
        "mesh": {"fsdp": 2},
        "optim": {"gamma": 0.05, "betas": [0.9, 0.99]},
    }
    assert manifest.check(saved(), other, "abc") == []


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
        manifest.check(saved(), config, fingerprint)
    notes = manifest.check(saved(), config, fingerprint, allow_changes=True)
    assert notes == [f"changed since the checkpoint: {words}"]


def test_other_libraries_are_noted():
    older = saved(versions=manifest.versions() | {"jax": "0.1"})
    (note,) = manifest.check(older, CONFIG, "abc")
    assert note.startswith("another version since the checkpoint: jax 0.1 -> ")


def test_a_checkpoint_without_a_record_is_noted():
    assert "not compared" in manifest.check({}, CONFIG, "abc")[0]
