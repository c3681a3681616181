"""The end of a run: a figure, a sample, the comparison, and what to do next."""

import shlex
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from train import config, distributed, files, metrics, reference, sample
from train.config import Config
from train.program import Program
from train.step import TrainState

PROMPT = "HAMLET.\n"


def finish(
    run: Config, folder: Path, history: list[dict], programs: Program, state: TrainState
) -> None:
    """Draws `loss.png`, writes `sample.txt`, and prints the result and the next command.

    All processes call it, since all hold parts of the model that the sample is drawn from.
    """
    step, text = int(state.step), ""
    wanted = run.run.sample_length and not run.run.quiet and run.data.task == "next-token"
    if wanted and step == run.steps:
        text = _sample(run, programs, state)
    if distributed.is_main():
        _write(run, folder, history, step, text)


def _write(run: Config, folder: Path, history: list[dict], step: int, text: str) -> None:
    baseline = reference.find(run)
    current = baseline if baseline and not baseline.stale else None
    curve = (current.heldout, "AdamW, same budget") if current else None
    unit = _unit(run)
    metrics.plot(history, folder / "loss.png", title=run.name, reference=curve, unit=unit)
    if run.run.quiet:
        return
    console = Console()
    if text:
        files.replace_text(folder / "sample.txt", text)
        console.print(Panel(Text(text), title="sample", title_align="left"))
    console.print(f"[bold]{_result(run, history)}[/bold]", highlight=False)
    console.print(_comparison(run, baseline), highlight=False, soft_wrap=True)
    console.print(f"curves: {folder / 'loss.png'}", highlight=False, soft_wrap=True)
    console.print(_next(run, folder, step), soft_wrap=True, highlight=False, markup=False)


def _unit(run: Config) -> str:
    """What a loss is of."""
    token = "byte" if run.data.tokenizer == "bytes" else "token"
    return {"masked": f"hidden {token}", "classify": "row"}.get(run.data.task, token)


def _next(run: Config, folder: Path, step: int) -> str:
    """What to do next; the last line is a command and nothing else."""
    command = f"{config.python()} -m train resume {shlex.quote(str(folder))}"
    if step < run.steps:
        return f"stopped at step {step} of {run.steps}, which is saved; go on:\n{command}"
    why = "to train longer (on a longer schedule, so the learning rate rises again):"
    return f"{why}\n{command} --steps {2 * run.steps}"


def _sample(run: Config, programs: Program, state: TrainState) -> str:
    data = programs.data()
    tokens = sample.sample(
        run.model,
        state.params,
        data.prompt(PROMPT),
        length=run.run.sample_length,
        tokens=data.vocab_size,
        seed=run.seed,
    )
    return data.decode(tokens)


def _result(run: Config, history: list[dict]) -> str:
    rows = [row for row in history if "heldout_loss" in row]
    if not rows:
        return f"{run.name}: stopped before its first evaluation"
    last = rows[-1]
    nats = f"{last['heldout_loss']:.3f} nats"
    figures = {
        "bits_per_byte": "{:.3f} bits a byte on held-out text ({})",
        "accuracy": "{:.1%} of the held-out rows right ({})",
    }
    for name, form in figures.items():
        if name in last:
            return f"{run.name}: {form.format(last[name], nats)} after {last['step']} steps"
    return f"{run.name}: {nats} a {_unit(run)} of held-out text after {last['step']} steps"


def _comparison(run: Config, baseline: reference.Reference | None) -> str:
    if baseline is None:
        again = f"{config.command(run)} --run.recompute-reference"
        return f"AdamW with the same budget: not known; to find out: {again}"
    if baseline.stale:
        again = f"{config.command(run)} --run.recompute-reference"
        return f"AdamW: what is stored belongs to another config; to find out: {again}"
    bits, nats = baseline.bits_per_byte, baseline.heldout[-1][1]
    reached = f"{nats:.3f} nats" if bits is None else f"{bits:.3f} bits a byte"
    return f"AdamW with the same budget: {reached} ({baseline.command})"
