"""A model as pure functions of a plain dict: what jit, grad and optimizers see."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from models.config import DecoderConfig, EncoderConfig
from models.decoder import Decoder
from models.depth import Constrain, identity
from models.encoder import Encoder


class Functional(NamedTuple):
    """A model as pure functions; see `split`.

    >>> import jax
    >>> model = split(DecoderConfig(vocab_size=256, context=8, width=16, layers=1, heads=2))
    >>> params = jax.eval_shape(model.init, jax.random.key(0))             # nothing is allocated
    >>> params["tokens"]["embedding"].shape, model.specs["tokens"]["embedding"]
    ((256, 16), P('tensor', 'fsdp'))
    """

    init: Callable[[jax.Array], Any]  # key -> params: nested dict of float32 arrays
    apply: Callable[..., jax.Array]  # (params, tokens[B, T], constrain=identity) -> logits
    specs: Any  # PartitionSpec for each leaf of params, in the same nested dict
    features: Callable[..., jax.Array]  # as apply -> x[B, T, D], what logits are made of
    logits: Callable[[Any, jax.Array], jax.Array]  # (params, x[..., D]) -> float32[..., V]
    linear: Callable[[Any], Any]  # params -> (float32[V, D], float32[V] or None), logits' factors


def split(config: DecoderConfig | EncoderConfig) -> Functional:
    """Separates a model's definition from its parameters.

    The module is traced once for its structure; nothing is allocated. After that parameters are
    an ordinary nested dict for `jax.jit`, which walks no module graph at each call as `nnx.jit`
    does.

    Args:
      config: shape and arithmetic. Configs that differ only in `attention`, `dtype`, `remat` or
        `attention_layer_scale` have the same params, so one set may run under several; those that
        differ in `scan_layers` have the same numbers, laid out by `stack_blocks`.

    Returns:
      A `Functional`:
        init: `key -> params`; jit it with `out_shardings` made from `specs` to create each shard
          in place, or pass it to `jax.eval_shape` for shapes alone.
        apply: `(params, tokens, constrain=identity, ...) -> logits`, float32[B, T, V] or
          float32[B, classes]; arguments and errors are those of `Decoder.__call__` and
          `Encoder.__call__`.
        specs: a `jax.sharding.PartitionSpec` for each leaf, structured as params, over the mesh
          axes "fsdp" and "tensor".
        features, logits: what `apply` composes. `logits(params, x)` is the last matrix product,
          float32[..., V] of x[..., D]: of all positions, or of as many at a time as fit in memory.
          Only a head for classes has features without a time axis, float[B, D].
        linear: `params -> (matrix[V, D], bias[V] or None)`, with which logits are
          `x @ matrix.T + bias`, for losses that never hold all of them.

    >>> import jax, jax.numpy as jnp
    >>> model = split(DecoderConfig(vocab_size=256, context=8, width=16, layers=1, heads=2))
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.zeros((3, 8), int)).shape
    (3, 8, 256)
    >>> params["blocks"]["00"]["mlp"]["up"].shape, model.specs["blocks"]["00"]["mlp"]["up"]
    ((16, 64), P('fsdp', 'tensor'))
    >>> x = model.features(params, jnp.zeros((3, 8), int))
    >>> model.logits(params, x[:, -1]).shape
    (3, 256)
    """

    def init(key: jax.Array):
        return nnx.to_pure_dict(nnx.state(_make(config, key)))

    def apply(
        params, tokens_BxT: jax.Array, constrain: Constrain = identity, **inputs: jax.Array | None
    ) -> jax.Array:
        return merge(params)(tokens_BxT, constrain, **inputs)

    def features(
        params, tokens_BxT: jax.Array, constrain: Constrain = identity, **inputs: jax.Array | None
    ) -> jax.Array:
        return merge(params).features(tokens_BxT, constrain, **inputs)

    def logits(params, x_xD: jax.Array) -> jax.Array:
        return merge(params).logits(x_xD)

    def linear(params) -> tuple[jax.Array, jax.Array | None]:
        return merge(params).linear()

    graph, state = _traced(config)
    merge = functools.partial(nnx.merge, graph)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(state))
    return Functional(init, apply, specs, features, logits, linear)


def module_of(config: DecoderConfig | EncoderConfig) -> Callable[[Any], Any]:
    """`params -> module`: a `Decoder` or an `Encoder` that has them."""
    return functools.partial(nnx.merge, _traced(config)[0])


def _traced(config: DecoderConfig | EncoderConfig) -> tuple[Any, Any]:
    """(graph, abstract state) of a module."""
    return nnx.split(nnx.eval_shape(functools.partial(_make, config), jax.random.key(0)))


def _make(config: DecoderConfig | EncoderConfig, key: jax.Array) -> Decoder | Encoder:
    rngs = nnx.Rngs(key)
    if isinstance(config, EncoderConfig):
        return Encoder(config, rngs=rngs)
    return Decoder(config, rngs=rngs)
