"""A batch: input tokens, targets, and weights of the loss."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """The rows of a step. Fields that the task does not use are None.

    Leaves are NumPy or JAX arrays whose first axis is the rows.
    """

    inputs: Any  # int32[B, T], input tokens
    targets: Any  # int32[B, T], next or masked tokens; int32[B], classes
    weights: Any = None  # float32 shaped as targets, of the loss; None weighs all targets alike
    segments: Any = None  # int32[B, T], numbers of the sequences packed into a row
    types: Any = None  # int32[B, T], 0 in a first sentence and 1 in a second


def next_tokens(tokens_BxT1: Any, weights: Any = None) -> Batch:
    """The batch of a causal language model: the target is the next token.

    >>> import numpy as np
    >>> next_tokens(np.array([[5, 6, 7]])).targets
    array([[6, 7]])
    """
    return Batch(tokens_BxT1[:, :-1], tokens_BxT1[:, 1:], weights)
