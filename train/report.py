"""The end of a run: a figure, a sample, the comparison, and what to do next."""

import functools
import threading
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from train import baseline as reference
from train import files, generate
from train.config import command_line
from train.config.schema import Config
from train.logging import figures
from train.parallel import processes
from train.program import Program
from train.step.train_step import TrainState

PROMPT = "HAMLET.\n"


def finish(
    config: Config,
    folder: Path,
    history: list[dict],
    programs: Program,
    state: TrainState,
    *,
    ended: bool,
    stop: threading.Event,
) -> None:
    """Draws `loss.png`, writes `sample.txt`, and prints the result and the next command.

    All processes call it, since all hold parts of the model that the sample is drawn from.

    Args:
      config: the config.
      folder: of the run.
      history: the rows of its metrics.
      programs: of `config`.
      state: after the last step that was done.
      ended: nothing is left to do.
      stop: the sample is left out where this is set.
    """
    wanted = (
        config.output.sample_length and not config.output.quiet and config.data.task == "next-token"
    )
    text = _sample(config, programs, state, stop) if wanted and ended else ""
    if processes.is_main():
        _write(config, folder, history, text, "" if ended else f"stopped at step {int(state.step)}")


def _write(config: Config, folder: Path, history: list[dict], text: str, stopped: str) -> None:
    baseline = reference.find(config)
    current = baseline if baseline and not baseline.stale else None
    curve = (current.heldout, "AdamW, same budget") if current else None
    unit = _unit(config)
    figures.plot(history, folder / "loss.png", title=config.name, reference=curve, unit=unit)
    if config.output.quiet:
        return
    console = Console()
    if text:
        files.replace_text(folder / "sample.txt", text)
        console.print(Panel(Text(text), title="sample", title_align="left"))
    # Paths and commands as they are: square brackets in them are no markup.
    plain = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    plain(_result(config, history), style="bold")
    if compared := _comparison(config, baseline, stopped):
        plain(compared)
    plain(f"curves: {folder / 'loss.png'}")
    plain(_next(config, folder, stopped))


def _unit(config: Config) -> str:
    """What a loss is of."""
    token = "byte" if config.data.tokenizer == "bytes" else "token"
    return {"masked": f"hidden {token}", "classify": "row"}.get(config.data.task, token)


def _next(config: Config, folder: Path, stopped: str) -> str:
    """What to do next; the last line is a command and nothing else."""
    command = command_line.call("resume", folder)
    if stopped:
        return f"{stopped} of {config.steps}, which is saved; go on:\n{command}"
    why = "to train longer (on a longer schedule, so the learning rate rises again):"
    return f"{why}\n{command} --steps {2 * config.steps}"


def _sample(config: Config, programs: Program, state: TrainState, stop: threading.Event) -> str:
    """The text; empty where a process was told to stop."""
    data, agree, flags = programs.data(), processes.Agreement(), [False]

    def stopped() -> bool:
        flags[:] = agree(stop.is_set())
        return flags[0]

    tokens = generate.sample(
        config.model,
        state.params,
        data.prompt(PROMPT),
        length=config.output.sample_length,
        tokens=data.vocab_size,
        seed=config.seed,
        stopped=stopped,
    )
    return "" if flags[0] else data.decode(tokens)


def _result(config: Config, history: list[dict]) -> str:
    rows = [row for row in history if "heldout_loss" in row]
    if not rows:
        return f"{config.name}: stopped before its first evaluation"
    last = rows[-1]
    nats = f"{last['heldout_loss']:.3f} nats"
    figures = {
        "bits_per_byte": "{:.3f} bits a byte on held-out text ({})",
        "accuracy": "{:.1%} of the held-out rows right ({})",
    }
    for name, form in figures.items():
        if name in last:
            return f"{config.name}: {form.format(last[name], nats)} after {last['step']} steps"
    return f"{config.name}: {nats} a {_unit(config)} of held-out text after {last['step']} steps"


def _comparison(config: Config, baseline: reference.Reference | None, stopped: str) -> str:
    """What AdamW reached; how to find out is offered at the end of another optimizer's run."""
    if baseline and not baseline.stale:
        bits, nats = baseline.bits_per_byte, baseline.heldout[-1][1]
        reached = f"{nats:.3f} nats" if bits is None else f"{bits:.3f} bits a byte"
        return f"AdamW with the same budget: {reached} ({baseline.command})"
    if stopped or reference.is_twin(config):
        return ""
    again = f"{command_line.command(config)} --output.recompute-reference"
    known = "what is stored belongs to another config" if baseline else "not known"
    return f"AdamW with the same budget: {known}; to find out: {again}"
