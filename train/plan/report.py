"""A plan as tables."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from train.cli.train import parse
from train.optimizers.sophia import SophiaG, SophiaH
from train.plan.flops import PEAKS
from train.plan.hlo import KINDS, Collective
from train.plan.plan import Plan, Step, options, plan

MFU = 0.4
HELP = """What a run needs: memory, operations and traffic, of devices that need not exist.

usage: python -m train plan [MODEL] [OPTIMIZER] [flags of a run] [options]

  --devices N        how many; default the fewest that --mesh.* need
  --compile          also compile the programs for fake CPU devices, and compare XLA's figures
  --peak-tflops X    of a device, for tokens a second; default those of known chips

python -m train plan gpt2-770m sophia-g --mesh.fsdp 8 --devices 240 --precision bfloat16
"""
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


def command(args: Sequence[str]) -> None:
    """`python -m train plan [MODEL] [OPTIMIZER] [flags] [--devices N] [--compile]`."""
    if {"-h", "--help"} & set(args):
        print(HELP)
        return
    known, words = options(args)
    config, console = parse(words, "python -m train plan"), Console()
    figures = plan(config, devices=known.devices, compile=known.compile)
    show(figures, console, known.peak_tflops)
    if config.precision == "auto" and config.model.dtype != "bfloat16":
        console.print(
            f"These are figures in {config.model.dtype}; on GPU and TPU a run is in bfloat16 "
            "unless told otherwise: add --precision bfloat16."
        )


def show(figures: Plan, console: Console, peak_tflops: float | None = None) -> None:
    """Prints a plan; tokens a second are those at `MFU` of the peak given, or of known chips."""
    _head(figures, console)
    console.print(_memory(figures), _collectives(figures), _speed(figures, peak_tflops))
    if waiting := _idle(figures):
        console.print(waiting, highlight=False)
    if any(step.compiled for step in figures.steps.values()):
        console.print(_compiled(figures))
        console.print(
            "XLA's figures are those of programs for CPU: it sums gradients on all devices before "
            "it cuts them, and keeps copies in other orders; attention, fusion and the order of "
            "work are others on a GPU or TPU. A loop's operations count once, its collectives as "
            "often as it turns."
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
    table.add_row("all", *(f"{step.total / 1e6:,.1f}" for step in steps))
    table.add_section()
    flops = (f"{step.flops / 1e12:,.3f}" for step in figures.steps.values())
    table.add_row("TFLOP of a device and step", *flops)
    return table


def _collectives(figures: Plan) -> Table:
    table = _table("exchanged by one device in a step: number, MB of results", "", figures.steps)
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


def _idle(figures: Plan) -> str:
    """A better sample where devices wait for rows; empty where there is none, or none waits."""
    config, devices = figures.config, figures.row_devices
    if not isinstance(config.optim, SophiaG | SophiaH):
        return ""
    size = config.batch_size, config.accumulation
    every, stride = config.optim.strides(*size)
    rows, groups = (
        config.batch_size // (config.accumulation * stride),
        config.optim.groups_of(*size),
    )
    fraction = config.optim.slices * config.accumulation * devices / (every * config.batch_size)
    if groups > 1 and rows // groups < devices and config.optim.shards(devices, *size) == 1:
        fewer = max(rows // devices, 1) * config.accumulation // every
        cure = "0 takes them side by side"
        if isinstance(config.optim, SophiaH):
            cure = f"{fewer} is faster, and noisier"
        return (
            f"{groups} sets of {rows // groups} sampled rows, one after the other, leave devices "
            f"waiting: --optim.groups {cure}."
        )
    if groups < rows or rows >= devices or fraction > 1:
        return ""
    return (
        f"{devices - rows} of {devices} devices wait while {rows} rows are sampled: "
        f"--optim.batch-fraction {fraction:.4g} --optim.groups 0, a row a device, takes no longer."
    )


def _compiled(figures: Plan) -> Table:
    table = _table("by hand and by XLA", "one device, one step", ("by hand", "XLA", "error"))
    for name, step in figures.steps.items():
        for label, ours, theirs in _pairs(step):
            looped = label == "GFLOP" and figures.config.model.scan_layers
            error = "loops once" if looped else f"{ours / theirs - 1:+.1%}" if theirs else ""
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
        ("MB in all", step.memory.total / 1e6, xla.total / 1e6),
        ("GFLOP", step.flops / 1e9, xla.flops / 1e9),
    ]
    for kind in KINDS:
        ours, theirs = (x.get(kind, Collective(0, 0)) for x in (step.on_cpu, xla.collectives))
        if ours.bytes or theirs.bytes:
            rows.append((f"MB of {kind}", ours.bytes / 1e6, theirs.bytes / 1e6))
    return rows
