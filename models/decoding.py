"""Autoregressive decoding: a decoder that caches the keys and values of earlier tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.attention import Cache
from models.config import DecoderConfig
from models.functional import module_of


class Cached(NamedTuple):
    """A decoder as functions of a cache; see `cached`.

    >>> model = cached(DecoderConfig(vocab_size=256, context=8, width=16, layers=2, heads=2))
    >>> model.init(3, 5).key.shape                                  # 5 places in each of 3 rows
    (2, 3, 5, 2, 8)
    """

    init: Callable[..., Cache]  # (rows, length=context, dtype=the config's) -> an empty cache
    apply: Callable[..., tuple[jax.Array, Cache]]  # params, tokens, cache, position
    features: Callable[..., tuple[jax.Array, Cache]]  # the same -> x[B, S, D], cache


def cached(config: DecoderConfig) -> Cached:
    """A decoder for sampling, which processes each token once.

    Params are those of `split(config)`, in either layout. A prompt of S tokens and then single
    tokens need two compiled programs, whatever the position. For prompts of unequal length, pad
    them on the right, take the logits at each row's last token, and continue from that position:
    cache entries of padding are overwritten before any token attends to them.

    Args:
      config: shape and arithmetic; attention is always computed by XLA.

    Returns:
      A `Cached`:
        init: `(rows, length=context, dtype=config.dtype) -> Cache` of zeros, with room for `length`
          tokens, prompt included.
        apply: `(params, tokens, cache, position) -> (logits, cache)`: reads int[B, S] tokens that
          follow the first `position` tokens, int or int32[B], of each row. The logits,
          float32[B, S, V], are those of `split(config).apply` on all tokens at once. A token past
          the end of the cache or outside the vocabulary gives NaN.
        features: the same with features float[B, S, D], the input of `split(config).logits`, in
          place of logits; for example to compute logits for the last token of a prompt only.

    Raises:
      ValueError: the config is an encoder's, or the length exceeds the context; when called, if
        the tokens do not fit the cache and `position` is a Python integer.

    >>> from models import split
    >>> config = DecoderConfig(vocab_size=256, context=8, width=16, layers=1, heads=2)
    >>> params, model = split(config).init(jax.random.key(0)), cached(config)
    >>> tokens, read = jnp.arange(12).reshape(3, 4), jax.jit(model.apply)
    >>> _, cache = read(params, tokens[:, :3], model.init(3), 0)
    >>> logits, cache = read(params, tokens[:, 3:], cache, 3)
    >>> together = jax.jit(split(config).apply)(params, tokens)
    >>> bool(jnp.allclose(logits[:, 0], together[:, 3], atol=1e-5))
    True
    """
    if not isinstance(config, DecoderConfig):
        raise ValueError(
            "an encoder predicts no next token and reads a whole row at once: pass a DecoderConfig."
        )
    calls = _Calls(config, module_of(config))
    return Cached(calls.init, calls.apply, calls.features)


@dataclasses.dataclass(frozen=True)
class _Calls:
    """The functions of `Cached`."""

    config: DecoderConfig
    merge: Callable[[Any], Any]  # params -> module

    def init(self, rows: int, length: int | None = None, dtype: Any = None) -> Cache:
        config = self.config
        length = config.context if length is None else length
        if length > config.context:
            raise ValueError(
                f"a cache of {length} tokens, but the model has a context of {config.context}: "
                f"make the cache shorter, or the model with context={length}."
            )
        heads = config.kv_heads or config.heads
        shape = (config.layers, rows, length, heads, config.head_width)
        return Cache(*(jnp.zeros(shape, dtype or config.dtype) for _ in range(2)))

    def features(
        self, params: Any, tokens_BxS: jax.Array, cache: Cache, position: int | jax.Array
    ) -> tuple[jax.Array, Cache]:
        known = position if isinstance(position, int) else 0
        if known < 0 or known + tokens_BxS.shape[1] > cache.key.shape[2]:
            raise ValueError(
                f"{tokens_BxS.shape[1]} tokens at position {known} do not fit a cache of "
                f"{cache.key.shape[2]}: make the cache longer, or start again with the last tokens."
            )
        return self.merge(params).extend(tokens_BxS, cache, position)

    def apply(
        self, params: Any, tokens_BxS: jax.Array, cache: Cache, position: int | jax.Array
    ) -> tuple[jax.Array, Cache]:
        x_BxSxD, cache = self.features(params, tokens_BxS, cache, position)
        return self.merge(params).logits(x_BxSxD), cache
