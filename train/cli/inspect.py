"""Commands on runs that were saved, each a function that `tyro` makes flags of."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from train import files, inputs, loop
from train import generate as sampling
from train.checkpoint import moved, warm_start
from train.cli import convert, flags
from train.config import command_line, serialize
from train.data import DataConfig
from train.parallel import processes
from train.parallel.mesh import MeshConfig
from train.parallel.processes import DistributedConfig

Folder = Annotated[Path, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run as if it had not stopped."""

    run: Folder
    """Folder of the run, such as runs/tiny-sophia-g-20260101-120000."""
    steps: int | None = None
    """Train to this many steps instead; the learning rate follows the longer schedule."""
    step: int | None = None
    """Start from this checkpoint instead of the newest; later ones are deleted."""
    warmup_steps: int | None = None
    """Warm up over this many steps instead."""
    allow_changes: bool = False
    """Go on although config or data are not those of the checkpoint."""
    compile_cache: str | None = None
    """Folder of compiled programs; by default that of a new run."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How devices are arranged; by default as before."""
    data: moved.Places = moved.STAYED
    """Where the data is now, if it has moved."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def resume(args: Sequence[str]) -> None:
    """Goes on with a run."""
    again = parse_resume(args)
    processes.start(again.distributed)
    loop.resume(
        again.run,
        steps=again.steps,
        step=again.step,
        warmup_steps=again.warmup_steps,
        mesh=again.mesh,
        data=again.data,
        allow_changes=again.allow_changes,
        compile_cache=again.compile_cache,
    )


def parse_resume(args: Sequence[str]) -> Resume:
    """What `resume` is told; the default mesh is that of the run.

    Raises:
      ValueError: the first word names no run.
    """
    folder = Path(args[0]) if args and not args[0].startswith("-") else None
    mesh = serialize.load(folder).mesh if folder else MeshConfig()
    default = Resume(run=tyro.MISSING, mesh=mesh)
    flags.check(args, {"": default}, "python -m train resume")
    return tyro.cli(Resume, args=args, default=default, prog="python -m train resume")


def evaluate(run: Folder, step: int | None = None, data: moved.Places = moved.STAYED) -> None:
    """Loss of a run on the whole held-out data.

    Args:
      run: folder of the run.
      step: of a checkpoint; default the newest.
      data: where its data is now, if it has moved.
    """
    loaded = _load(run, step, data)
    with moved.explained(loaded.config):
        now = loaded.data().fingerprint
    if loaded.fingerprint not in ("", now):
        print(
            f"the data is not what the run was trained on ({loaded.fingerprint} -> {now})",
            file=sys.stderr,
        )
    for name, value in loaded.evaluate(loaded.params).items():
        _say(f"{name.replace('_', ' ')}: {value:.4f}")
    _say(f"{run} at step {loaded.step}")


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
      prompt: the text to go on from.
      length: tokens to add.
      temperature: of the softmax; lower is safer and duller, 0 takes the likeliest.
      top_k: tokens to draw from, the likeliest; 0 for all.
      top_p: probability to draw from, that of the likeliest tokens which reach it.
      seed: of the draws.
      step: of a checkpoint; default the newest.
      data: where its data is now, if it has moved; of it the tokenizer is read.
    """
    how = sampling.Picking(temperature, top_k, top_p)
    how.check()
    if length < 0:
        raise ValueError(f"--length {length} is negative: it is the number of tokens to add.")
    sampling.check_seed(seed)
    loaded = _load(run, step, data)
    with moved.explained(loaded.config):
        tokenizer = inputs.load_tokenizer(loaded.config)
    tokens = sampling.sample(
        loaded.config.model,
        loaded.params,
        tokenizer.encode(prompt),
        length=length,
        how=how,
        tokens=tokenizer.vocab_size,
        seed=seed,
    )
    _say(tokenizer.decode(tokens))


def export(
    run: Folder, output: Folder, step: int | None = None, data: moved.Places = moved.STAYED
) -> None:
    """Write a run's model and tokenizer as a Hugging Face folder, which `transformers` loads.

    Args:
      run: folder of the run.
      output: the folder to write; a model and a tokenizer in it are replaced.
      step: of a checkpoint; default the newest.
      data: where its data is now, if it has moved; of it the tokenizer is read, and for a
        classifier the names of the classes.
    """
    files.check_local(output, "the folder to write")
    loaded = _load(run, step, data)
    with moved.explained(loaded.config):
        notes = convert.export(run, output, loaded)
    for note in notes:
        print(note, file=sys.stderr)
    _say(f"{output} holds {run} at step {loaded.step}, for transformers' from_pretrained")


def import_(
    folder: Folder,
    run: Folder,
    optimizer: str = "adamw",
    tokenizer: str = "",
    data: DataConfig = DataConfig(),  # noqa: B008
) -> None:
    """Make a run, at step 0, of a model in a Hugging Face folder, with its tokenizer.

    `eval`, `sample`, `export` and `resume` take it. To train it with settings of your own, start a
    new run from it: `python -m train MODEL OPTIMIZER --start-from RUN`.

    Args:
      folder: with `config.json` and `model.safetensors`, of GPT-2, Llama, Qwen3 or BERT.
      run: the folder to make.
      optimizer: that `resume` goes on with.
      tokenizer: of the model's text, as for `--data.tokenizer`; by default that of the folder.
      data: to train on and be judged by; a classifier needs a source. Its task is what the model
        does, and its tokenizer is not used.
    """
    files.check_local(folder, "the model's folder")
    if data.tokenizer != DataConfig.tokenizer:
        raise ValueError(f"give the tokenizer as --tokenizer {data.tokenizer}.")
    convert.begin(folder, run, optimizer, tokenizer, data)
    _say(f"{run} holds the model; go on with: {command_line.call('sample', run, 'PROMPT')}")


def _load(run: Path, step: int | None, data: moved.Places = moved.STAYED) -> warm_start.Saved:
    """A run's parameters; tells of checkpoints that were passed over, beside what is asked for."""
    loaded = warm_start.load(run, step, data)
    for note in loaded.notes:
        print(note, file=sys.stderr)
    return loaded


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)
