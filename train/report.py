"""The end of a run: its figure, a sample, the comparison with AdamW, and the next command."""

import functools
import threading
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from train import baseline, files, generate
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

    All processes call it: each holds parts of the model that the sample is drawn from.

    Args:
      config: of the run.
      folder: of the run.
      history: the rows of its metrics.
      programs: of `config`.
      state: after the last step.
      ended: whether the run is done; if not, it was told to stop.
      stop: set if the process was told to stop; the sample is then left out.
    """
    wanted = (
        config.output.sample_length and not config.output.quiet and config.data.task == "next-token"
    )
    text = _sample(config, programs, state, stop) if wanted and ended else ""
    if processes.is_main():
        _write(config, folder, history, text, "" if ended else f"stopped at step {int(state.step)}")


def _write(config: Config, folder: Path, history: list[dict], text: str, stopped: str) -> None:
    adamw = baseline.find(config)
    current = adamw if adamw and not adamw.stale else None
    curve = (current.heldout, "AdamW, same budget") if current else None
    unit = _unit(config)
    figures.plot(history, folder / "loss.png", title=config.name, reference=curve, unit=unit)
    if config.output.quiet:
        return
    console = Console()
    if text:
        files.replace_text(folder / "sample.txt", text)
        console.print(Panel(Text(text), title="sample", title_align="left"))
    # Without markup, since paths and commands may have square brackets.
    plain = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    plain(_result(config, history), style="bold")
    if compared := comparison(config, adamw, stopped):
        plain(compared)
    plain(f"curves: {folder / 'loss.png'}")
    plain(_next(config, folder, stopped))


def _unit(config: Config) -> str:
    """The unit whose mean a loss is."""
    token = "byte" if config.data.tokenizer == "bytes" else "token"
    return {"masked": f"hidden {token}", "classify": "row"}.get(config.data.task, token)


def _next(config: Config, folder: Path, stopped: str) -> str:
    """How to go on; the last line is a command and nothing else."""
    command = command_line.call("resume", folder)
    if stopped:
        return f"{stopped} of {config.steps}, which is saved; to go on:\n{command}"
    why = "to train longer (on a longer schedule, so the learning rate rises again):"
    return f"{why}\n{command} --steps {2 * config.steps}"


def _sample(config: Config, programs: Program, state: TrainState, stop: threading.Event) -> str:
    """A text; empty if a process was told to stop."""
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
        "accuracy": "{:.1%} held-out accuracy ({})",
    }
    for name, form in figures.items():
        if name in last:
            return f"{config.name}: {form.format(last[name], nats)} after {last['step']} steps"
    return f"{config.name}: {nats} a {_unit(config)} of held-out text after {last['step']} steps"


def comparison(config: Config, adamw: baseline.Reference | None, stopped: str) -> str:
    """What AdamW reached with the same budget, or the command that finds out.

    Args:
      config: of the run.
      adamw: the stored result of AdamW, if there is one.
      stopped: where the run stopped; empty if it is done. Only a finished run offers the command.
    """
    if adamw and not adamw.stale:
        bits, nats = adamw.bits_per_byte, adamw.heldout[-1][1]
        reached = f"{nats:.3f} nats" if bits is None else f"{bits:.3f} bits a byte"
        return f"AdamW with the same budget: {reached} ({adamw.command})"
    if stopped or baseline.is_twin(config):
        return ""
    again = f"{command_line.command(config)} --output.recompute-reference"
    known = "the stored result belongs to another config" if adamw else "not known"
    return f"AdamW with the same budget: {known}; to find out: {again}"
