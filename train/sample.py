"""Text from a trained model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from train import data
from train.step import Apply


def sample(
    apply: Apply,
    params: Any,
    prompt: str,
    *,
    length: int,
    context: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continues a prompt, byte by byte.

    Args:
      apply: the model.
      params: its parameters.
      prompt: not empty.
      length: bytes to add.
      context: longest window the model reads.
      temperature: of the softmax; lower is safer and duller.
      seed: of the draws.

    Returns:
      The prompt and what follows it.

    Raises:
      ValueError: the prompt is empty.
    """
    tokens = data.encode(prompt)
    if not len(tokens):
        raise ValueError("the prompt is empty: the model needs a byte to start from.")
    start, total = len(tokens), len(tokens) + length
    window = min(context, total)
    buffer = jnp.zeros(total, jnp.int32).at[:start].set(tokens)

    def extend(params, position, buffer):
        first = jnp.maximum(position - window, 0)
        logits = apply(params, jax.lax.dynamic_slice(buffer, (first,), (window,))[None])[0]
        last = logits[position - first - 1, :256] / temperature
        key = jax.random.fold_in(jax.random.key(seed), position)
        return buffer.at[position].set(jax.random.categorical(key, last).astype(jnp.int32))

    @jax.jit
    def fill(params, buffer):
        return jax.lax.fori_loop(start, total, functools.partial(extend, params), buffer)

    filled = fill(params, buffer)  # an argument, since a program cannot hold what others hold
    return data.decode(jax.device_get(filled))
