"""A plan as tables."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from train.plan.flops import PEAKS
from train.plan.hlo import KINDS, Collective
from train.plan.plan import Plan, Step

MFU = 0.4
LABELS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "batch": "batch",
    "gathered": "parameters gathered",
    "gradients": "gradients",
    "activations": "activations",
    "loss": "logits and their gradient",
    "curvature": "sample of curvature",
}


def show(figures: Plan, console: Console, peak_tflops: float | None = None) -> None:
    """Prints a plan, with tokens per second at an MFU of 40% on the given peak or known chips."""
    _head(figures, console)
    console.print(_memory(figures), _collectives(figures), _speed(figures, peak_tflops))
    if waiting := figures.idle:
        console.print(waiting, highlight=False)
    if any(step.compiled for step in figures.steps.values()):
        console.print(_compiled(figures))
        console.print(
            "XLA's figures are for CPU, where it all-reduces gradients and keeps copies in other "
            "layouts; attention, fusion and scheduling differ on GPU and TPU. FLOPs in a loop "
            "count once, collectives once per iteration."
        )


def _head(figures: Plan, console: Console) -> None:
    config = figures.config
    axes = " x ".join(f"{name} {size}" for name, size in figures.mesh.items())
    console.print(
        f"{config.name}: {figures.parameters:,} parameters on {figures.devices} devices ({axes}); "
        f"{config.batch_size} x {config.sequence_length} tokens a step, {config.model.dtype}, "
        f"{config.model.attention} attention. Estimated from shapes; nothing was allocated.",
        highlight=False,
    )


def _table(title: str, first: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _memory(figures: Plan) -> Table:
    table = _table("MB on one device", "", figures.steps)
    steps = [step.memory for step in figures.steps.values()]
    for name, label in LABELS.items():
        table.add_row(label, *(f"{getattr(step, name) / 1e6:,.1f}" for step in steps))
    table.add_section()
    table.add_row("total", *(f"{step.total / 1e6:,.1f}" for step in steps))
    table.add_section()
    flops = (f"{step.flops / 1e12:,.3f}" for step in figures.steps.values())
    table.add_row("TFLOP per device and step", *flops)
    return table


def _collectives(figures: Plan) -> Table:
    table = _table("collectives of one device in a step: number, MB of results", "", figures.steps)
    for kind in KINDS:
        if any(kind in step.collectives for step in figures.steps.values()):
            table.add_row(kind, *(_cell(s.collectives, kind) for s in figures.steps.values()))
    return table


def _cell(found: dict[str, Collective], kind: str) -> str:
    return f"{found[kind].number:,}  {found[kind].bytes / 1e6:,.1f}" if kind in found else ""


def _speed(figures: Plan, peak_tflops: float | None) -> Table:
    chips = {"given": peak_tflops} if peak_tflops else PEAKS
    table = _table(
        f"{figures.flops_per_token / 1e9:.4g} GFLOP a token (MFU is a share of these; curvature "
        f"adds {figures.curvature:.2%})",
        "device",
        ("TFLOP/s", f"tokens / s at {MFU:.0%} MFU", "days for the run"),
    )
    tokens = figures.config.steps * figures.config.batch_size * figures.config.sequence_length
    for name, peak in chips.items():
        rate = figures.tokens_per_second(1e12 * peak, MFU)
        table.add_row(name, f"{peak:,.1f}", f"{rate:,.0f}", f"{tokens / rate / 86400:,.2f}")
    return table


def _compiled(figures: Plan) -> Table:
    table = _table("estimate and XLA", "one device, one step", ("estimate", "XLA", "error"))
    for name, step in figures.steps.items():
        for label, ours, theirs in _pairs(step):
            looped = label == "GFLOP" and figures.config.model.scan_layers
            error = "loop counts once" if looped else f"{ours / theirs - 1:+.1%}" if theirs else ""
            table.add_row(f"{name}: {label}", f"{ours:,.1f}", f"{theirs:,.1f}", error)
        table.add_section()
    return table


def _pairs(step: Step) -> list[tuple[str, float, float]]:
    xla = step.compiled
    if xla is None:
        return []
    rows = [
        ("MB of arguments", step.memory.arguments / 1e6, xla.arguments / 1e6),
        ("MB of temporaries", step.memory.temporaries / 1e6, xla.temporaries / 1e6),
        ("MB in total", step.memory.total / 1e6, xla.total / 1e6),
        ("GFLOP", step.flops / 1e9, xla.flops / 1e9),
    ]
    for kind in KINDS:
        ours, theirs = (x.get(kind, Collective(0, 0)) for x in (step.on_cpu, xla.collectives))
        if ours.bytes or theirs.bytes:
            rows.append((f"MB of {kind}", ours.bytes / 1e6, theirs.bytes / 1e6))
    return rows
