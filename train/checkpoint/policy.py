"""When a run saves its state, and which checkpoint is the best one: functions of numbers alone."""

import math
from collections.abc import Iterable, Mapping


def save_due(step: int, *, every: int, overdue: bool = False, last: bool = False) -> bool:
    """Whether the state after a step is saved.

    Args:
      step: steps done.
      every: steps between saves.
      overdue: the clock asks for a save.
      last: the run ends or stops here.

    >>> [step for step in range(1, 10) if save_due(step, every=4, last=step == 9)]
    [4, 8, 9]
    """
    return step % every == 0 or overdue or last


def overdue(seconds: float, minutes: float) -> bool:
    """Whether the last save was more than `minutes` ago; 0 minutes turn the clock off.

    >>> overdue(61, 1), overdue(59, 1), overdue(1e9, 0)
    (True, False, False)
    """
    return minutes > 0 and seconds > 60 * minutes


def best_step(steps: Iterable[int], losses: Mapping[int, float]) -> int | None:
    """The step with the lowest finite loss, the first of equal ones; None without any.

    >>> best_step([10, 20, 30], {10: 3.0, 20: float("nan"), 30: 2.0, 40: 1.0})
    30
    """
    finite = [step for step in steps if math.isfinite(losses.get(step, math.nan))]
    return min(finite, key=lambda step: losses[step], default=None)
