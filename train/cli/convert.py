"""The commands `import` and `export`, which exchange models with Hugging Face folders."""

import sys

from train import files
from train.checkpoint import moved
from train.cli.inspect import Folder, load, say
from train.config import command_line
from train.convert import from_hugging_face, to_hugging_face
from train.data import DataConfig


def import_(
    folder: Folder,
    run: Folder,
    optimizer: str = "adamw",
    tokenizer: str = "",
    data: DataConfig = DataConfig(),  # noqa: B008
) -> None:
    """Make a run, at step 0, from the model in a Hugging Face folder, with its tokenizer.

    `eval`, `sample`, `export` and `resume` take it. To train it with settings of your own, start a
    new run from it: `python -m train MODEL OPTIMIZER --start-from RUN`.

    Args:
      folder: with `config.json` and `model.safetensors`, of GPT-2, Llama, Qwen3 or BERT.
      run: the folder to make.
      optimizer: that `resume` goes on with.
      tokenizer: of the model's text, as for `--data.tokenizer`; by default that of the folder.
      data: to train and evaluate on; a classifier needs a source. The model decides the task;
        `--data.tokenizer` is not used.
    """
    files.check_local(folder, "the model's folder")
    if data.tokenizer != DataConfig.tokenizer:
        raise ValueError(f"give the tokenizer as --tokenizer {data.tokenizer}.")
    from_hugging_face.begin(folder, run, optimizer, tokenizer, data)
    say(f"{run} holds the model; go on with: {command_line.call('sample', run, 'PROMPT')}")


def export(
    run: Folder, output: Folder, step: int | None = None, data: moved.Places = moved.STAYED
) -> None:
    """Write a run's model and tokenizer as a Hugging Face folder, which `transformers` loads.

    Args:
      run: folder of the run.
      output: the folder to write; a model and a tokenizer in it are replaced.
      step: of a checkpoint; default the newest.
      data: where its data is now, if it has moved; the tokenizer is read from it, and the class
        names of a classifier.
    """
    files.check_local(output, "the folder to write")
    loaded = load(run, step, data)
    with moved.explained(loaded.config):
        notes = to_hugging_face.export(run, output, loaded)
    for note in notes:
        print(note, file=sys.stderr)
    say(f"{output} holds {run} at step {loaded.step}, for transformers' from_pretrained")
