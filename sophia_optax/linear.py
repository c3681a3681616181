"""Logits that are never held whole: the last matrix product, a few positions at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

from sophia_optax import _checks
from sophia_optax.curvature import accumulation_dtype, widen

KEPT = "sophia_optax.linear"
"""Name of what a backward pass takes from the forward pass instead of making it again."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearLogits:
    """Logits features @ matrixᵀ + bias over a large vocabulary, as the factors of the product.

    `logits_fn` may return it in place of an array, with likelihood "categorical": labels and losses
    are then made of `chunk` positions at a time, and forward and backward pass hold float32[B,
    chunk, V] instead of [B, T, V]. The backward pass multiplies once more, which is a third of the
    operations of this layer. Products are taken in the dtype of features, sums in float32 at least.

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
        _checks.positive_integer("chunk", self.chunk, "It is the number of positions at a time.")

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
    """`losses(logits[B, t, V], *positions[B, t, ...])`, [B, t], of t positions at a time: [B, T].

    What `losses` names `KEPT` the backward pass does not make again. The last chunk is filled with
    zeros, less than one position for each chunk.
    """
    check_factors(logits)
    rows, length, _ = logits.shape
    number = max(-(-length // logits.chunk), 1)
    size = -(-length // number)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, number * size - length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(rows, number, size, *x.shape[2:]).swapaxes(0, 1)

    # Once, before the loop: in it, shards would add up their gradients of it chunk by chunk.
    matrix = _varying_like(logits.matrix, logits.features)
    bias = None if logits.bias is None else _varying_like(logits.bias, logits.features)

    def of_chunk(features, *positions):
        return losses(_product(features, matrix, bias), *positions)

    # In a loop nothing can be merged with what was computed before it.
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    of_chunk = jax.checkpoint(of_chunk, prevent_cse=False, policy=policy)
    parts = jax.lax.map(lambda x: of_chunk(*x), (cut(logits.features), *map(cut, positions)))
    return parts.swapaxes(0, 1).reshape(rows, -1)[:, :length]


def kept(x: jax.Array) -> jax.Array:
    """Named `KEPT`."""
    return checkpoint_name(x, KEPT)


def _product(features: jax.Array, matrix: jax.Array, bias: jax.Array | None) -> jax.Array:
    """float32[B, t, V] at least, multiplied in the dtype of features.

    With bfloat16 operands the algorithm is named: asking for float32 logits alone would make the
    backward pass multiply in float32. The matrix is cast here, chunk by chunk: so its gradient is
    summed over chunks in its own dtype.
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


def _varying_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Marked as differing over the axes of an enclosing `shard_map` over which `like` differs."""
    axes = tuple(_varies_over(like) - _varies_over(x))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _varies_over(x: jax.Array) -> frozenset[Any]:
    """Axes of an enclosing `shard_map`; jax has spelt it in two ways."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
