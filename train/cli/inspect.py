"""The commands `eval` and `sample`, which look at a run; tyro makes flags of their arguments."""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from train import generate, inputs
from train.checkpoint import moved, warm_start

Folder = Annotated[Path, tyro.conf.Positional]


def evaluate(run: Folder, step: int | None = None, data: moved.Places = moved.STAYED) -> None:
    """Loss of a run on all held-out data.

    Args:
      run: folder of the run.
      step: of a checkpoint; default the newest.
      data: where its data is now, if it has moved.
    """
    loaded = load(run, step, data)
    with moved.explained(loaded.config):
        now = loaded.data().fingerprint
    if loaded.fingerprint not in ("", now):
        print(
            f"the data is not what the run was trained on ({loaded.fingerprint} -> {now})",
            file=sys.stderr,
        )
    for name, value in loaded.evaluate(loaded.params).items():
        say(f"{name.replace('_', ' ')}: {value:.4f}")
    say(f"{run} at step {loaded.step}")


def sample(
    run: Folder,
    prompt: Annotated[str, tyro.conf.Positional],
    length: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    step: int | None = None,
    data: moved.Places = moved.STAYED,
) -> None:
    """Continue a prompt.

    Args:
      run: folder of the run.
      prompt: the text to continue.
      length: tokens to add.
      temperature: of the softmax; lower is safer and duller, 0 takes the likeliest token.
      top_k: draw from this many of the likeliest tokens; 0 for all.
      top_p: draw from the likeliest tokens that together have this probability.
      seed: of the draws.
      step: of a checkpoint; default the newest.
      data: where its data is now, if it has moved; only the tokenizer is read from it.
    """
    how = generate.Picking(temperature, top_k, top_p)
    how.check()
    if length < 0:
        raise ValueError(f"--length {length} is negative: it is the number of tokens to add.")
    generate.check_seed(seed)
    loaded = load(run, step, data)
    with moved.explained(loaded.config):
        tokenizer = inputs.load_tokenizer(loaded.config)
    tokens = generate.sample(
        loaded.config.model,
        loaded.params,
        tokenizer.encode(prompt),
        length=length,
        how=how,
        tokens=tokenizer.vocab_size,
        seed=seed,
    )
    say(tokenizer.decode(tokens))


def load(run: Path, step: int | None, data: moved.Places = moved.STAYED) -> warm_start.LoadedRun:
    """A run's parameters; names checkpoints that could not be read, on standard error."""
    loaded = warm_start.load(run, step, data)
    for note in loaded.notes:
        print(note, file=sys.stderr)
    return loaded


def say(text: str) -> None:
    """Prints a text as it is: square brackets in it are no markup."""
    Console().print(text, highlight=False, soft_wrap=True, markup=False)
