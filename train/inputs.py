"""The data of a run: read when it is first needed, checked against the model, put on the mesh."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from train import data
from train.config.schema import Config
from train.data import tokenizers
from train.data.tokenizers import Tokenizer
from train.parallel import mesh
from train.step.batch import Batch


def settled(config: Config) -> Config:
    """The config as it is saved: it means the same from any folder, and without its data.

    Paths of the data are absolute. A bin: source brings its tokenizer. If the tokenizer was not
    named on the command line, the model's vocabulary grows to hold its tokens.
    """
    chosen = data.resolved(config.data)
    if config.data.tokenizer != "bytes" or chosen.tokenizer == "bytes":
        return dataclasses.replace(config, data=chosen)
    size = max(config.model.vocab_size, tokenizers.load(chosen.tokenizer).vocab_size)
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, data=chosen, model=model)


def batch_shapes(config: Config, placed: Mesh) -> Batch:
    """The leaves of a step's batch, with their shardings."""
    sizes = {"batch_size": config.batch_size, "sequence_length": config.sequence_length}
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.batch_sharding(placed)),
        data.batch_shapes(config.data, **sizes),
    )


def loader(config: Config, batch_size: int) -> Callable[[], data.Data]:
    """Reads the data at its first call, and raises its errors then."""
    return functools.cache(functools.partial(_load, config, batch_size))


def _load(config: Config, batch_size: int) -> data.Data:
    sizes = {"batch_size": batch_size, "sequence_length": config.sequence_length}
    loaded = data.load(config.data, **sizes, seed=config.seed)
    _check_vocabulary(config, loaded.vocab_size)
    wanted = getattr(config.model, "classes", 0)
    if loaded.classes != wanted:
        raise ValueError(
            f"{config.data.source} has {loaded.classes} classes ({', '.join(loaded.class_names)}), "
            f"the model {wanted}: set --model.classes {loaded.classes}."
        )
    return loaded


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a run, without its data.

    Raises:
      ValueError: it cannot be read, or it has more tokens than the model.
    """
    tokenizer = tokenizers.load(config.data.tokenizer)
    _check_vocabulary(config, tokenizer.vocab_size)
    return tokenizer


def _check_vocabulary(config: Config, tokens: int) -> None:
    if tokens > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {config.data.tokenizer} has {tokens} tokens, more than the "
            f"{config.model.vocab_size} of the model: set --model.vocab-size {tokens}."
        )
