"""Logits that are never held whole: the last matrix product, a few positions at a time."""

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
    """Logits features @ matrixᵀ + bias over a large vocabulary, as the factors of the product.

    `logits_fn` may return it in place of an array, with likelihood "categorical": labels and losses
    are then made of `chunk` positions at a time, and forward and backward pass hold float32[B,
    chunk, V] instead of [B, T, V]. The backward pass of a loss multiplies once more, a third more
    operations in this layer; that of drawn labels does not. Products are taken in the dtype of
    features, sums in float32 at least.

    >>> import jax.numpy as jnp
    >>> logits = LinearLogits(jnp.ones((2, 8, 3)), jnp.ones((100, 3)), chunk=4)
    >>> logits.shape, softmax_cross_entropy(logits, jnp.zeros((2, 8), int)).shape
    ((2, 8, 100), (2, 8))
    """

    features: jax.Array  # float[B, T, D], without unit
    matrix: jax.Array  # float[V, D], perhaps the embedding itself
    bias: jax.Array | None = None  # float[V]
    chunk: int = dataclasses.field(default=128, metadata={"static": True})  # positions of a row

    def __post_init__(self):
        checks.positive_integer("chunk", self.chunk, "It is the number of positions at a time.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits: (B, T, V)."""
        return (*self.features.shape[:-1], self.matrix.shape[0])


def softmax_cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
    """Cross-entropy in nats of each label, of whole logits or of `LinearLogits` chunk by chunk.

        l = log Σ_v exp(f_v) - f_y

    It is a pure function, which may be differentiated any number of times in either mode. On a mesh
    a gradient of `LinearLogits` reduces that of the matrix over devices once a chunk; call it in a
    `jax.shard_map` over the axes of the batch, with the matrix whole on each device, and it is
    reduced once.

    Args:
      logits: `float[..., V]`, or `LinearLogits` of `[B, T, V]`.
      labels: `int[...]`, the true classes, 0 to V - 1.

    Returns:
      `float32[...]`, one loss for each label; float64 for logits of it.

    Raises:
      ValueError: the shapes do not fit each other.

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
            f"`labels` has shape {jnp.shape(labels)}, but logits of {logits.shape} have one label "
            f"for each of {logits.shape[:-1]}."
        )
    if not isinstance(logits, LinearLogits):
        return optax.softmax_cross_entropy_with_integer_labels(widen(logits), labels)
    return by_chunk(optax.softmax_cross_entropy_with_integer_labels, logits, labels)


def check_factors(logits: LinearLogits) -> None:
    """Refuses factors that make no logits."""
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
    """[B, T], of `losses(logits[B, t, V], *positions[B, t, ...])`, [B, t], chunk by chunk."""
    check_factors(logits)
    whole = _whole(logits)

    def of_chunk(x):
        features, *at = x
        return losses(_product(features, *whole), *at)

    # In a loop nothing can be merged with what was computed before it.
    of_chunk = jax.checkpoint(of_chunk, prevent_cse=False)
    return _join(logits, jax.lax.map(of_chunk, _cut(logits, logits.features, *positions)))


def gradient_by_chunk(
    loss: Callable[..., jax.Array], logits: LinearLogits, *positions: jax.Array
) -> LinearLogits:
    """Gradient of the sum over chunks of `loss(logits[B, t, V], *positions[B, t, ...])`, a scalar.

    Where nothing is differentiated again: a chunk goes back at once, and no product is made twice.
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
    """(matrix, bias) as a loop over chunks takes them.

    Widened, so that their gradients are summed over chunks in float32. Marked here, since inside
    the loop the shards of a `shard_map` would add up their gradients chunk by chunk.
    """
    factors = logits.matrix, logits.bias
    return jax.tree.map(lambda x: varying_like(widen(x), logits.features), factors)


def _sizes(logits: LinearLogits) -> tuple[int, int]:
    """(number of chunks, positions of each): as even as can be."""
    number = max(-(-logits.shape[1] // logits.chunk), 1)
    return number, -(-logits.shape[1] // number)


def _cut(logits: LinearLogits, *positions: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] to [chunks, B, t, ...]; the last is filled with zeros, less than one a chunk."""
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
    """float32[B, t, V] at least, multiplied in the dtype of features.

    With bfloat16 operands the algorithm is named: asking for float32 logits alone would make the
    backward pass multiply in float32.
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
