"""The loss curves of a run as a figure."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train import files


def plot(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    reference: tuple[Sequence[tuple[int, float]], str] | None = None,
    unit: str = "byte",
) -> None:
    """Draw the loss curves of a run as a PNG, in nats on the left and bits on the right.

    Args:
        history: rows of `read_history`: `loss` is training, `heldout_loss` held-out, in nats.
        path: where to write; its folder exists.
        title: above the figure.
        reference: ([(step, held-out loss)], label) of another run.
        unit: that a loss is the mean over, such as "byte".
    """
    # Imported here because it takes half a second. A Figure of its own leaves pyplot's state alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    train, heldout = _curve(history, "loss"), _curve(history, "heldout_loss")
    points, name = reference or ([], "")
    other = np.array(points, float).reshape(-1, 2).T
    axes.plot(*train, color="#9ecae1", linewidth=0.6)
    axes.plot(train[0], _smooth(train[1]), color="#1f6fb4", linewidth=1.8, label="training, mean")
    if reference is not None:
        axes.plot(*other, "--", color="#777777", linewidth=1.4, label=_label(name, other))
    label = _label("held-out", heldout)
    axes.plot(*heldout, "o-", color="#d9480f", markersize=4, linewidth=1.2, label=label)
    _decorate(axes, title, unit, np.concatenate([train, heldout, other], axis=1))
    files.replace(Path(path), figure.savefig)


def _decorate(axes: Any, title: str, unit: str, points: np.ndarray) -> None:
    axes.set_title(title, loc="left", fontweight="bold", pad=10)
    axes.set(xlabel="step", ylabel=f"loss (nats per {unit})")
    bit = math.log(2)
    bits = axes.secondary_yaxis("right", functions=(lambda x: x / bit, lambda x: x * bit))
    bits.set_ylabel(f"bits per {unit}", labelpad=8)
    for side in (axes.spines["top"], axes.spines["right"], bits.spines["right"]):
        side.set_visible(False)
    axes.tick_params(length=3)
    bits.tick_params(length=0)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    if points.size:
        # The first steps fall from ln(vocabulary); with them in view, the rest would look flat.
        low, high = points[1].min(), np.quantile(points[1], 0.98)
        margin = 0.05 * (high - low) + 0.01
        axes.set(xlim=(0, 1.02 * points[0].max() + 1), ylim=(low - margin, high + margin))


def _label(name: str, curve: np.ndarray) -> str:
    return f"{name}: {curve[1, -1]:.3f} at the end" if curve.size else name


def _curve(history: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Float64 [2, points]: steps and finite values of one metric."""
    points = [(row["step"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
    return np.array(sorted(points), float).reshape(-1, 2).T


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the run; over fewer points at both ends."""
    if len(values) < 3:
        return values
    window = np.hanning(2 * (len(values) // 40) + 5)[1:-1]
    weights = np.convolve(np.ones_like(values), window, "same")
    return np.convolve(values, window, "same") / weights
