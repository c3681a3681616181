"""Moments of independent draws, and the squared error of samples against a noisy reference."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Moments of independent draws of one vector, float64[P]."""

    draws: int
    mean: np.ndarray
    variance: np.ndarray  # unbiased variance of one draw

    @property
    def squared_standard_error(self) -> np.ndarray:
        return self.variance / self.draws

    @property
    def squared_mean(self) -> np.ndarray:
        """The mean product of two distinct draws: unbiased for the squared expectation."""
        return self.mean**2 - self.squared_standard_error


def moments(draws: Iterable[np.ndarray]) -> Moments:
    """The moments of at least two draws."""
    number, total, squares = 0, np.float64(0), np.float64(0)
    for number, h in enumerate(draws, 1):  # noqa: B007
        h = np.asarray(h, np.float64)
        total, squares = total + h, squares + h**2
    variance = (squares - total**2 / number) / (number - 1)
    return Moments(number, np.asarray(total / number), np.asarray(variance))


def relative_squared_error(samples: Iterable[np.ndarray], reference: Moments) -> dict[str, float]:
    """Relative squared error of samples: in total, with its standard error, and the median.

    The noise of the reference is subtracted from the total.
    """
    noise = reference.squared_standard_error
    scale = reference.squared_mean.sum()
    squares = np.stack([(h.astype(np.float64) - reference.mean) ** 2 for h in samples])
    totals = (squares.sum(1) - noise.sum()) / scale
    return {
        "total_error": float(totals.mean()),
        "standard_error": float(totals.std(ddof=1) / len(totals) ** 0.5),
        "median_error": float(np.median(squares.mean(0) / reference.mean**2)),
    }
