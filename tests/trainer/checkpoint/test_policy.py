"""When a run is saved."""

import pytest

from train.checkpoint import policy


@pytest.mark.parametrize(("late", "want"), [(0, [3, 6, 9]), (1, [4, 8])])
def test_an_overdue_save_comes_once(late, want):
    """A step a minute; several processes hear one step late that a save is overdue."""
    saved, asked = [], []
    for step in range(1, 10):
        last = saved[-1] if saved else 0
        asked.append(policy.overdue(60.0 * (step - last), 2.5))
        heard = asked[-1 - late] if len(asked) > late else False
        stale = saved[-1] + late if saved else -1
        if policy.save_due(step, every=400, overdue=heard and step > stale):
            saved.append(step)
    assert saved == want


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({10: 3.0, 20: 1.0, 30: 1.0}, 20),  # the first of equal ones
        ({10: float("nan"), 20: float("inf"), 30: 9.0}, 30),
        ({10: float("nan")}, None),
        ({40: 0.1}, None),  # not among the steps
        ({}, None),
    ],
)
def test_the_best_step_has_the_lowest_finite_loss(losses, best):
    assert policy.best_step([10, 20, 30], losses) == best
