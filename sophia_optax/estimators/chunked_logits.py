"""Logits as the factors of the last matrix product, multiplied out a few positions at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.numerics import accumulation_dtype, widen
from sophia_optax.sharding import varying_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearLogits:
    """Logits over a large vocabulary, kept as factors: features @ matrixᵀ + bias.

    With likelihood "categorical", `logits_fn` may return this in place of an array. Labels and
    losses are then computed for `chunk` positions at a time, so that forward and backward pass hold
    float32[B, chunk, V] instead of [B, T, V]. The backward pass of a loss repeats the product: a
    third more operations in this layer. The backward pass of sampled labels does not. Products are
    taken in the dtype of features, and sums in float32 or wider.

    >>> import jax.numpy as jnp
    >>> logits = LinearLogits(jnp.ones((2, 8, 3)), jnp.ones((100, 3)), chunk=4)
    >>> logits.shape, softmax_cross_entropy(logits, jnp.zeros((2, 8), int)).shape
    ((2, 8, 100), (2, 8))
    """

    features: jax.Array  # float[B, T, D]
    matrix: jax.Array  # float[V, D], which may be the embedding
    bias: jax.Array | None = None  # float[V]
    chunk: int = dataclasses.field(default=128, metadata={"static": True})  # positions of a row

    def __post_init__(self):
        checks.positive_integer("chunk", self.chunk, "It is the number of positions at a time.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits: (B, T, V)."""
        return (*self.features.shape[:-1], self.matrix.shape[0])


def softmax_cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each label, in nats; `LinearLogits` are evaluated chunk by chunk.

        l = log Σ_v exp(f_v) - f_y

    It is a pure function, and may be differentiated any number of times in either mode. On a mesh,
    the gradient of the matrix of `LinearLogits` is reduced over devices once per chunk. To reduce
    it only once, call this function inside a `jax.shard_map` over the axes of the batch, with the
    whole matrix on each device.

    Args:
      logits: `float[..., V]`, or `LinearLogits` of shape `[B, T, V]`.
      labels: `int[...]`, the true classes, 0 to V - 1.

    Returns:
      `float32[...]`, one loss for each label; float64 if the logits are float64.

    Raises:
      ValueError: the shapes of logits and labels, or of the factors, do not fit each other.

    Source: the textbook's; the chunks are ours.

    >>> import jax, jax.numpy as jnp
    >>> head = jnp.eye(4, 2)
    >>> def loss(head, features):
    ...     logits = LinearLogits(features, head, chunk=1)
    ...     return softmax_cross_entropy(logits, jnp.array([[0, 1]])).mean()
    >>> print(jax.grad(loss)(head, jnp.ones((1, 2, 2))).shape)
    (4, 2)
    """
    if jnp.shape(labels) != logits.shape[:-1]:
        raise ValueError(
            f"`labels` has shape {jnp.shape(labels)}, but logits of {logits.shape} need one label "
            f"for each of {logits.shape[:-1]}."
        )
    if not isinstance(logits, LinearLogits):
        return optax.softmax_cross_entropy_with_integer_labels(widen(logits), labels)
    return by_chunk(optax.softmax_cross_entropy_with_integer_labels, logits, labels)


def check_factors(logits: LinearLogits) -> None:
    """Rejects factors whose shapes do not fit."""
    features, matrix = jnp.shape(logits.features), jnp.shape(logits.matrix)
    bias = matrix[:1] if logits.bias is None else jnp.shape(logits.bias)
    if len(features) != 3 or len(matrix) != 2 or features[2] != matrix[1] or bias != matrix[:1]:
        raise ValueError(
            "LinearLogits holds features float[B, T, D], a matrix float[V, D] and a bias float[V] "
            f"or None, but their shapes are {features}, {matrix} and {bias}. A head of shape "
            "[D, V] is passed transposed."
        )


def by_chunk(
    losses: Callable[..., jax.Array], logits: LinearLogits, *positions: jax.Array
) -> jax.Array:
    """[B, T] from `losses(logits[B, t, V], *positions[B, t, ...])`, which returns [B, t]."""
    check_factors(logits)
    whole = _whole(logits)

    def of_chunk(x):
        features, *at = x
        return losses(_product(features, *whole), *at)

    # prevent_cse is not needed in a loop: XLA merges nothing in it with what is outside.
    of_chunk = jax.checkpoint(of_chunk, prevent_cse=False)
    return _join(logits, jax.lax.map(of_chunk, _cut(logits, logits.features, *positions)))


def gradient_by_chunk(
    loss: Callable[..., jax.Array], logits: LinearLogits, *positions: jax.Array
) -> LinearLogits:
    """Gradient of the sum over chunks of `loss(logits[B, t, V], *positions[B, t, ...])`, a scalar.

    For results that are not differentiated again: the backward pass of a chunk follows its forward
    pass at once, so no product is repeated.
    """
    check_factors(logits)
    whole = _whole(logits)
    zeros = jax.tree.map(lambda x: varying_like(jnp.zeros_like(x), logits.features), whole)

    def add(total, x):
        features, *at = x
        of_chunk = jax.grad(lambda x, whole: loss(_product(x, *whole), *at), (0, 1))
        gradient, part = of_chunk(features, whole)
        return optax.tree.add(total, part), gradient

    total, parts = jax.lax.scan(add, zeros, _cut(logits, logits.features, *positions))
    like: Any = (logits.matrix, logits.bias)
    matrix, bias = optax.tree.cast_like(total, like)
    return dataclasses.replace(logits, features=_join(logits, parts), matrix=matrix, bias=bias)


def _whole(logits: LinearLogits) -> tuple[jax.Array, jax.Array | None]:
    """(matrix, bias), ready for a loop over chunks.

    Widened, so that their gradients are summed over chunks in float32. Marked as varying outside
    the loop; inside it, the shards of a `shard_map` would sum their gradients once per chunk.
    """
    factors = logits.matrix, logits.bias
    return jax.tree.map(lambda x: varying_like(widen(x), logits.features), factors)


def _sizes(logits: LinearLogits) -> tuple[int, int]:
    """(number of chunks, positions in each), as even as possible."""
    number = max(-(-logits.shape[1] // logits.chunk), 1)
    return number, -(-logits.shape[1] // number)


def _cut(logits: LinearLogits, *positions: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] to [chunks, B, t, ...]; zeros fill the last chunk."""
    number, size = _sizes(logits)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, number * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(-1, number, size, *x.shape[2:]).swapaxes(0, 1)

    return tuple(map(cut, positions))


def _join(logits: LinearLogits, parts: jax.Array) -> jax.Array:
    """[chunks, B, t, ...] to [B, T, ...]."""
    rows, length, _ = logits.shape
    return parts.swapaxes(0, 1).reshape(rows, -1, *parts.shape[3:])[:, :length]


def _product(features: jax.Array, matrix: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Logits [B, t, V], float32 or wider, multiplied in the dtype of features.

    With bfloat16 operands the algorithm is named, because float32 as `preferred_element_type` alone
    would make the backward pass multiply in float32.
    """
    bfloat16 = features.dtype == jnp.bfloat16
    logits = jnp.einsum(
        "BTD,VD->BTV",
        features,
        matrix.astype(features.dtype),
        precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if bfloat16 else None,
        preferred_element_type=accumulation_dtype(features),
    )
    return logits if bias is None else logits + bias.astype(logits.dtype)
