"""When a run is saved."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from train.checkpoint import policy
from train.config.presets import preset
from train.logging.throughput import Health
from train.parallel import processes as distributed
from train.step.train_step import TrainState


@pytest.mark.parametrize(("processes", "want"), [(1, [3, 6, 9]), (2, [4, 8])])
def test_an_overdue_save_comes_once(processes, want, monkeypatch):
    """A step a minute; several processes hear one step late that a save is overdue."""
    time = mock.Mock(perf_counter=mock.Mock(return_value=0.0))
    monkeypatch.setattr(policy, "time", time)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(distributed, "_any", jnp.array)
    run = preset()
    run = dataclasses.replace(run, output=dataclasses.replace(run.output, checkpoint_minutes=2.5))
    programs = SimpleNamespace(data=lambda: SimpleNamespace(fingerprint=""))
    meter, checkpoints = SimpleNamespace(log=mock.Mock(), health=Health()), mock.Mock()
    meter.flush = mock.Mock()
    keep, agree = policy.Saver(run, programs, checkpoints, meter), distributed.Agreement()
    for step in range(1, 10):
        time.perf_counter.return_value = 60.0 * step
        (overdue,) = agree(keep.overdue())
        keep.save(step, {"params": jnp.ones(2)}, overdue=overdue)
    assert [call.args[0] for call in checkpoints.save.call_args_list] == want


def state(step=3, **changes):
    arrays = {"params": {"w": jnp.ones((8, 2))}, "opt_state": (jnp.zeros(3), jnp.int32(5))}
    return TrainState(**{"step": jnp.int32(step), **arrays, **changes})


def test_a_state_must_be_that_of_its_step_and_finite_in_all_its_parts():
    assert policy.wrong_here(3, state()) == ""
    assert policy.wrong_here(4, state()) == "it holds the state of step 3"
    assert policy.wrong_here(3, {"step": jnp.int32(2)}) == "it holds the state of step 2"
    bad = state(opt_state=(jnp.array([0.0, jnp.inf, 0.0]), jnp.int32(5)))
    assert policy.wrong_here(3, bad).startswith("opt_state/0 is not finite")
    bad = state(params={"w": jnp.ones((8, 2)).at[7, 1].set(jnp.nan)})
    assert policy.wrong_here(3, bad).startswith("params/w is not finite")


def test_what_an_optimizer_keeps_is_not_saved_either_where_it_is_not_finite():
    meter, checkpoints = mock.Mock(health=Health()), mock.Mock(latest=2)
    keep = policy.Saver(preset(), mock.Mock(), checkpoints, meter)
    bad = state(opt_state=(jnp.array([0.0, jnp.nan, 0.0]),))
    with pytest.raises(FloatingPointError, match=r"opt_state/0 is not finite at step 3, .* step 2"):
        keep.save(3, bad, last=True)
    checkpoints.save.assert_not_called()
