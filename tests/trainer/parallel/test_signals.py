"""The first signal asks a run to stop, the second ends the process."""

import signal
import subprocess
import sys

import pytest

from train.parallel import signals


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
