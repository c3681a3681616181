"""One token after another: a decoder that keeps the keys and values of what it has read."""

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
    apply: Callable[..., tuple[jax.Array, Cache]]  # (params, tokens, cache, position) -> logits, it
    features: Callable[..., tuple[jax.Array, Cache]]  # the same -> x[B, S, D], what logits are of


def cached(config: DecoderConfig) -> Cached:
    """A decoder for sampling, which computes each token once.

    Params are those of `split(config)`, in either layout. A prompt of S tokens and then single ones
    make two programs, whatever the position. Prompts of unequal length start together: pad them
    on the right, take the logits of each row's last token, and go on from its own position; what
    padding left in the cache is written over before it is seen.

    Args:
      config: shape and arithmetic; attention is computed by xla.

    Returns:
      A `Cached`:
        init: `(rows, length=context, dtype=config.dtype) -> Cache` of zeros, with places for
          `length` tokens, prompt included.
        apply: `(params, tokens, cache, position) -> (logits, cache)`: reads int[B, S] tokens that
          follow the first `position`, int or int32[B], of each row; logits float32[B, S, V] are
          those of `split(config).apply` on all the tokens at once. A token past the last place, as
          one outside the vocabulary, makes NaN.
        features: the same with float[B, S, D] instead, of which `split(config).logits` makes
          logits: of a prompt's last token alone, for example.

    Raises:
      ValueError: for an encoder, or a length above the context; when called, for tokens that a
        position known to Python leaves no place for.

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
            "an encoder has no next token, and sees all of a row at once: pass a DecoderConfig."
        )
    merge = module_of(config)

    def init(rows: int, length: int = config.context, dtype: Any = config.dtype) -> Cache:
        if length > config.context:
            raise ValueError(
                f"a cache of {length} tokens, but the model has a context of {config.context}: "
                f"make it of {config.context}, or the model with context={length}."
            )
        heads = config.kv_heads or config.heads
        shape = (config.layers, rows, length, heads, config.head_width)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def features(
        params: Any, tokens_BxS: jax.Array, cache: Cache, position: int | jax.Array
    ) -> tuple[jax.Array, Cache]:
        known = position if isinstance(position, int) else 0
        if known < 0 or known + tokens_BxS.shape[1] > cache.key.shape[2]:
            raise ValueError(
                f"{tokens_BxS.shape[1]} tokens at position {known} do not fit a cache of "
                f"{cache.key.shape[2]}: make it longer, or start again with the last tokens."
            )
        return merge(params).extend(tokens_BxS, cache, position)

    def apply(
        params: Any, tokens_BxS: jax.Array, cache: Cache, position: int | jax.Array
    ) -> tuple[jax.Array, Cache]:
        x_BxSxD, cache = features(params, tokens_BxS, cache, position)
        return merge(params).logits(x_BxSxD), cache

    return Cached(init, apply, features)
