"""Masks tokens for a masked language model."""

import jax
import jax.numpy as jnp


def mask_tokens(
    key: jax.Array,
    tokens: jax.Array,
    *,
    mask_token: int,
    vocab_size: int,
    rate: float = 0.15,
    maskable: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Masks tokens that the model must predict; the original `tokens` are the labels.

    Each token is chosen independently with probability `rate`. Of the chosen tokens .8 become the
    mask token, .1 a uniformly random token, and .1 stay unchanged.

    Args:
      key: a JAX key for the random draws.
      tokens: int[B, T].
      mask_token: the id of [MASK], 103 in BERT's vocabulary.
      vocab_size: random tokens are below it.
      rate: probability above 0 and at most 1.
      maskable: bool[B, T], False for padding and for tokens such as [CLS]; default all True.

    Returns:
      (int[B, T], float32[B, T]): the model's input, and weights that are 1 at the chosen tokens.

    Raises:
      ValueError: the rate or the mask token is out of range.

    Source: Devlin et al. 2019, "BERT", section 3.1; their data has a fixed number of chosen tokens
    in each row, where we choose tokens independently.

    >>> tokens = jnp.full((1, 8), 7)
    >>> inputs, weights = mask_tokens(jax.random.key(0), tokens, mask_token=3, vocab_size=9, rate=1)
    >>> inputs, weights.sum()
    (Array([[3, 3, 3, 3, 3, 3, 3, 3]], dtype=int32), Array(8., dtype=float32))
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate} is not a share of tokens: choose one above 0, at most 1.")
    if not 0 <= mask_token < vocab_size:
        raise ValueError(
            f"mask_token={mask_token} is outside a vocabulary of {vocab_size}: pass the id of "
            "[MASK]."
        )
    choose, kind, draw = jax.random.split(key, 3)
    chosen = jax.random.uniform(choose, tokens.shape) < rate
    chosen = chosen if maskable is None else chosen & maskable
    share = jax.random.uniform(kind, tokens.shape)
    random = jax.random.randint(draw, tokens.shape, 0, vocab_size, tokens.dtype)
    hidden = jnp.where(share < 0.8, mask_token, jnp.where(share < 0.9, random, tokens))
    inputs = jnp.where(chosen, hidden.astype(tokens.dtype), tokens)
    return inputs, chosen.astype(jnp.float32)
