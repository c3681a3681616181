"""Which checkpoints a run keeps beside its last ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


class Best:
    """Orbax's policy of what to keep: the step of the lowest held-out loss."""

    def __init__(self, losses: Mapping[int, float]):
        self._losses = losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        losses = [self._losses.get(info.step, math.nan) for info in checkpoints]
        best = min((loss for loss in losses if math.isfinite(loss)), default=None)
        first = losses.index(best) if best is not None else -1
        return [place == first for place in range(len(losses))]
