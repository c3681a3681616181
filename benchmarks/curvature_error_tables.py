"""The tables of `benchmarks.curvature_error`."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Cells = dict[tuple[int, int | None], Row]  # (every n-th row, groups); None: one group per row
PAPER, DEFAULT = (2, 1), (10, None)


def show(found: dict[str, Any]) -> None:
    """Prints the tables of both estimators."""
    console = Console(width=105)
    cells = {(row["fraction"], row["groups"]): row for row in found["gauss_newton_bartlett"]}
    show_gauss_newton(cells, found["update_interval"], console)
    one = largest_standard_error(cells, lambda groups: groups == 1)
    more = largest_standard_error(cells, lambda groups: groups != 1)
    console.print(
        f"{found['parameters']} parameters, loss {found['loss']:.3f}. Relative standard errors of "
        f"totals: up to {one:.0%} with one group, {more:.0%} with more. Error of the reference: "
        f"{found['reference_error']:.1e} in total (subtracted), "
        f"{found['reference_median_error']:.1e} for the median coordinate.",
        highlight=False,
    )
    show_hutchinson(found["hutchinson"], console)


def largest_standard_error(cells: Cells, chosen: Callable[[int | None], bool]) -> float:
    """The largest standard error of a total, as a share of it."""
    rows = (row for (_, groups), row in cells.items() if chosen(groups))
    return max(row["standard_error"] / row["total_error"] for row in rows)


def show_gauss_newton(cells: Cells, interval: int, console: Console) -> None:
    paper = cells.get(PAPER)
    apart = f" ({paper['overhead_apart']:.2%} without the shared forward pass)" if paper else ""
    table = Table(
        title="Gauss-Newton-Bartlett: relative squared error of one sample, total / median",
        caption=f"one sample in {interval} steps; * the paper{apart}; ** the default",
    )
    every_groups = sorted({groups for _, groups in cells}, key=lambda n: (n is None, n))
    names = (f"{n} group{'s' * (n > 1)}" if n else "one group per row" for n in every_groups)
    for column in ("rows", "overhead", *names):
        table.add_column(column, justify="right")
    for fraction in dict.fromkeys(fraction for fraction, _ in cells):
        if row := cells.get((fraction, None)):
            texts = (cell(cells, fraction, groups) for groups in every_groups)
            table.add_row(sampled_rows(row), f"{row['overhead']:.2%}", *texts)
    console.print(table)


def show_hutchinson(rows: list[Row], console: Console) -> None:
    table = Table(title="Hutchinson: relative squared error of one sample")
    for column in ("rows", "groups", "overhead", "total", "median", "error of the reference"):
        table.add_column(column, justify="right")
    for row in rows:
        errors = (f"{row[key]:.3g}" for key in ("total_error", "median_error", "reference_error"))
        groups = str(row["groups"] or "one per row")
        table.add_row(sampled_rows(row), groups, f"{row['overhead']:.2%}", *errors)
    console.print(table)


def sampled_rows(row: Row) -> str:
    return f"{row['rows']} = 1/{row['fraction']}"


def cell(cells: Cells, fraction: int, groups: int | None) -> str:
    if (row := cells.get((fraction, groups))) is None:
        return "-"
    mark = {PAPER: " *", DEFAULT: " **"}.get((fraction, groups), "")
    return " / ".join(f"{row[key]:.2g}" for key in ("total_error", "median_error")) + mark
