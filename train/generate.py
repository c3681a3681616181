"""Text from a trained model, with a cache of keys and values."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import models


class Picking(NamedTuple):
    """How the next token is drawn from its logits."""

    temperature: float = 0.8
    """Of the softmax; lower is safer and duller, 0 takes the likeliest token."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""

    def check(self) -> None:
        """Raises ValueError for values with which no token could be picked."""
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"--temperature {self.temperature} --top-k {self.top_k} --top-p {self.top_p} picks "
                "nothing: choose a temperature of at least 0 (0 takes the likeliest token), a "
                "top-k of at least 0 (0 draws from all), and a top-p above 0 and at most 1."
            )


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that is out of range."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be at least 0 and below 2^32: choose another --seed.")


def pick(key: jax.Array, logits_V: jax.Array, how: Picking) -> jax.Array:
    """Draws a token, int32. Ties at the edge of `top_k` and `top_p` may all be drawn.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.

    >>> logits = jnp.log(jnp.array([.1, .6, .3]))
    >>> int(pick(jax.random.key(0), logits, Picking(temperature=0)))
    1
    """
    if how.temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    scaled = logits_V / how.temperature
    falling = jnp.sort(scaled, descending=True)
    least = falling[min(how.top_k or len(falling), len(falling)) - 1]
    if how.top_p < 1:
        before = jnp.cumsum(jax.nn.softmax(falling)) - jax.nn.softmax(falling)
        reached = jnp.where(before < how.top_p, falling, jnp.inf)
        least = jnp.maximum(least, jnp.min(reached))
    return jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf)).astype(
        jnp.int32
    )


def sample(
    config: models.DecoderConfig | models.EncoderConfig,
    params: Any,
    prompt: np.ndarray,
    *,
    length: int,
    how: Picking | None = None,
    tokens: int | None = None,
    seed: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Continues a prompt, token by token; each token costs one position of the model.

    When the context is full, its second half is read again and the text goes on from there.

    Args:
      config: of the model.
      params: its parameters.
      prompt: int32[S], not empty. If it is longer than the context, only its end is read.
      length: tokens to add.
      how: the next token is picked; default `Picking()`.
      tokens: how many of the model's tokens the tokenizer knows, counted from 0; others are not
        drawn. Default all.
      seed: of the draws, from 0 to 2^32 - 1.
      stopped: called whenever the context is full; if true, the text ends there.

    Returns:
      int32[S + length], the prompt and its continuation.

    Raises:
      ValueError: the prompt is empty, `how` picks nothing, `seed` is out of range, or the model is
        not a decoder.
    """
    how = how or Picking()
    how.check()
    check_seed(seed)
    if not isinstance(config, models.DecoderConfig):
        raise ValueError(
            "an encoder predicts hidden tokens and cannot continue a text: give a decoder."
        )
    extend = _extend(config, how, tokens or config.vocab_size, _mesh_of(params))
    text = np.asarray(prompt, np.int32)
    if not len(text):
        raise ValueError("the prompt is empty: the model needs a token to start from.")
    end = len(text) + length
    while len(text) < end and not stopped():
        half = max(config.context // 2, 1)
        window = text if len(text) < config.context else text[-half:]
        steps = min(config.context - len(window) + 1, end - len(text))
        new = extend(params, window[None], np.array([seed, len(text)], np.uint32), steps)
        text = np.concatenate([text, np.asarray(new)])
    return text


def _mesh_of(params: Any) -> jax.sharding.Mesh | None:
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, jax.sharding.Mesh) else None


@functools.lru_cache(maxsize=8)
def _extend(
    config: models.DecoderConfig, how: Picking, tokens: int, mesh: jax.sharding.Mesh | None
) -> Callable[..., jax.Array]:
    """(params, window int32[1, S], (seed, place) uint32[2], steps) -> int32[steps].

    The result is replicated on the mesh, since each process reads it. The key is made inside: an
    array on one device cannot be an argument of a program of several processes.
    """
    model = models.cached(config)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def extend(params, window, seed, steps):
        start = window.shape[1]
        key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])

        def next_token(tokens_BxS, cache, position):
            logits, cache = model.apply(params, tokens_BxS, cache, position)
            key_here = jax.random.fold_in(key, position)
            return pick(key_here, logits[0, -1, :tokens], how), cache

        def one(carry, position):
            token, cache = carry
            token, cache = next_token(token[None, None], cache, position)
            return (token, cache), token

        first, cache = next_token(window, model.init(1, start + steps - 1), 0)
        _, others = jax.lax.scan(one, (first, cache), jnp.arange(start, start + steps - 1))
        return jnp.concatenate([first[None], others])

    return jax.jit(extend, static_argnames="steps", out_shardings=whole)
