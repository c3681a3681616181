"""What is saved, and what must not be: states that are not finite, or not of their step."""

import types
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from saved_states import mesh_of
from small_run import small

from train.checkpoint import autosave, validate
from train.checkpoint.run_folder import Run
from train.checkpoint.store import Checkpoints
from train.logging.throughput import Health
from train.step.train_step import TrainState


def state(step=3, **changes):
    arrays = {"params": {"w": jnp.ones((8, 2))}, "opt_state": (jnp.zeros(3), jnp.int32(5))}
    return TrainState(**{"step": jnp.int32(step), **arrays, **changes})


@pytest.mark.parametrize("sharded", [False, True])
def test_a_state_must_be_that_of_its_step_and_finite_in_all_its_parts(sharded):
    def placed(x):
        rows = PartitionSpec("data") if x.ndim == 2 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh_of(8), rows))

    def here(**changes):
        made = state(**changes)
        return jax.tree.map(placed, made) if sharded else made

    assert validate.problem(3, here()) == ""
    assert validate.problem(4, here()) == "it holds the state of step 3"
    assert validate.problem(3, {"step": jnp.int32(2)}) == "it holds the state of step 2"
    bad = here(opt_state=(jnp.array([0.0, jnp.inf, 0.0]), jnp.int32(5)))
    assert validate.problem(3, bad).startswith("opt_state/0 is not finite")
    bad = here(params={"w": jnp.ones((8, 2)).at[7, 1].set(jnp.nan)})
    assert validate.problem(3, bad).startswith("params/w is not finite")


@pytest.fixture
def run(tmp_path):
    """A run that saves every 6 steps, and its log, which notes when it is synced."""
    events = []
    log = types.SimpleNamespace(sync=lambda: events.append("metrics on the disk"))
    meter = types.SimpleNamespace(log=log, health=Health(), flush=lambda: events.append("flushed"))
    data = types.SimpleNamespace(fingerprint="")
    programs = types.SimpleNamespace(data=lambda: data)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        made = Run(small(tmp_path / "run"), tmp_path / "run", programs, checkpoints)
        with mock.patch.object(checkpoints, "save", wraps=checkpoints.save) as save:
            save.side_effect = lambda step, *args: events.append(step) or mock.DEFAULT
            yield autosave.Autosave(made, meter), checkpoints, events


def test_metrics_are_on_the_disk_before_a_state_is(run):
    keep, _, events = run
    for step in (5, 6, 7):
        keep.save(step, state(step))
    assert events == ["flushed", "metrics on the disk", 6]


def test_an_overdue_state_is_saved_unless_one_was_saved_since(run):
    keep, _, events = run
    keep.save(4, state(4), overdue=True)
    keep.save(4, state(4), overdue=True)  # raised before the save at step 4
    keep.save(5, state(5), overdue=True)
    assert [event for event in events if isinstance(event, int)] == [4, 5]


def test_what_an_optimizer_keeps_is_not_saved_either_where_it_is_not_finite(run):
    keep, checkpoints, _ = run
    keep.save(2, state(2), last=True)
    bad = state(opt_state=(jnp.array([0.0, jnp.nan, 0.0]),))
    with pytest.raises(FloatingPointError, match=r"opt_state/0 is not finite at step 3, .* step 2"):
        keep.save(3, bad, last=True)
    assert checkpoints.steps == [2]
