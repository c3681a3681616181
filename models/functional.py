"""A model as pure functions of a plain dict of parameters, for jit, grad and optimizers."""

import dataclasses
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
    features: Callable[..., jax.Array]  # as apply -> x[B, T, D], the input of logits
    logits: Callable[[Any, jax.Array], jax.Array]  # (params, x[..., D]) -> float32[..., V]
    unembedding: Callable[[Any], Any]  # params -> (float32[V, D], float32[V] or None)


def split(config: DecoderConfig | EncoderConfig) -> Functional:
    """Separates a model's definition from its parameters.

    The module is traced once for its structure; nothing is allocated. Parameters are an ordinary
    nested dict, so `jax.jit` does not walk a module graph at each call, as `nnx.jit` does.

    Args:
      config: shape and arithmetic. Configs that differ only in `attention`, `dtype`, `remat` or
        `attention_layer_scale` share their params. Configs that differ in `scan_layers` have the
        same values in two layouts, which `stack_blocks` and `unstack_blocks` convert.

    Returns:
      A `Functional`:
        init: `key -> params`; jit it with `out_shardings` made from `specs` to create each shard
          in place, or pass it to `jax.eval_shape` for the shapes.
        apply: `(params, tokens, constrain=identity, ...) -> logits`, float32[B, T, V] or
          float32[B, classes]; arguments and errors are those of `Decoder.__call__` and
          `Encoder.__call__`.
        specs: a `jax.sharding.PartitionSpec` for each leaf of params, over the mesh axes "fsdp" and
          "tensor".
        features, logits: the two halves of `apply`. `logits(params, x)` is the last matrix product,
          float32[..., V] from x[..., D], for all positions or for a chunk of them. A head for
          classes has features without a time axis, float[B, D].
        unembedding: `params -> (matrix[V, D], bias[V] or None)`; logits are `x @ matrix.T + bias`.
          It is for chunked logits, which are never held all at once.

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
    graph, state = _traced(config)
    calls = _Calls(functools.partial(nnx.merge, graph))
    specs = nnx.to_pure_dict(nnx.get_partition_spec(state))
    init = functools.partial(_init, config)
    return Functional(init, calls.apply, specs, calls.features, calls.logits, calls.unembedding)


@dataclasses.dataclass(frozen=True)
class _Calls:
    """The methods of a module as functions of its parameters."""

    merge: Callable[[Any], Any]  # params -> module

    def apply(
        self,
        params,
        tokens_BxT: jax.Array,
        constrain: Constrain = identity,
        **inputs: jax.Array | None,
    ) -> jax.Array:
        return self.merge(params)(tokens_BxT, constrain, **inputs)

    def features(
        self,
        params,
        tokens_BxT: jax.Array,
        constrain: Constrain = identity,
        **inputs: jax.Array | None,
    ) -> jax.Array:
        return self.merge(params).features(tokens_BxT, constrain, **inputs)

    def logits(self, params, x_xD: jax.Array) -> jax.Array:
        return self.merge(params).logits(x_xD)

    def unembedding(self, params) -> tuple[jax.Array, jax.Array | None]:
        return self.merge(params).unembedding()


def module_of(config: DecoderConfig | EncoderConfig) -> Callable[[Any], Any]:
    """`params -> module`: a `Decoder` or an `Encoder` with these parameters."""
    return functools.partial(nnx.merge, _traced(config)[0])


def _traced(config: DecoderConfig | EncoderConfig) -> tuple[Any, Any]:
    """(graph, abstract state) of a module."""
    return nnx.split(nnx.eval_shape(functools.partial(_make, config), jax.random.key(0)))


def _init(config: DecoderConfig | EncoderConfig, key: jax.Array) -> Any:
    return nnx.to_pure_dict(nnx.state(_make(config, key)))


def _make(config: DecoderConfig | EncoderConfig, key: jax.Array) -> Decoder | Encoder:
    rngs = nnx.Rngs(key)
    if isinstance(config, EncoderConfig):
        return Encoder(config, rngs=rngs)
    return Decoder(config, rngs=rngs)
