"""When a run is saved."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from train import distributed, saver
from train.config import preset
from train.meter import Health


@pytest.mark.parametrize(("processes", "want"), [(1, [3, 6, 9]), (2, [4, 8])])
def test_an_overdue_save_comes_once(processes, want, monkeypatch):
    """A step a minute; several processes hear one step late that a save is overdue."""
    time = mock.Mock(perf_counter=mock.Mock(return_value=0.0))
    monkeypatch.setattr(saver, "time", time)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(distributed, "_any", jnp.array)
    run = preset()
    run = dataclasses.replace(run, run=dataclasses.replace(run.run, checkpoint_minutes=2.5))
    programs = SimpleNamespace(data=lambda: SimpleNamespace(fingerprint=""))
    meter, checkpoints = SimpleNamespace(log=mock.Mock(), health=Health()), mock.Mock()
    meter.flush = mock.Mock()
    keep, agree = saver.Saver(run, programs, checkpoints, meter), distributed.Agreement()
    for step in range(1, 10):
        time.perf_counter.return_value = 60.0 * step
        (overdue,) = agree(keep.overdue())
        keep.save(step, SimpleNamespace(params=jnp.ones(2)), {}, overdue=overdue)
    assert [call.args[0] for call in checkpoints.save.call_args_list] == want
