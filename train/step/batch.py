"""What a step is given: tokens, what they should have been, and which of them count."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """The rows of a step; what a model or a loss does not need is None.

    Leaves are arrays of NumPy or JAX that lead with the rows, so any of them may be cut alike.
    """

    inputs: Any  # int32[B, T], tokens that the model reads
    targets: Any  # int32[B, T], the next or the hidden tokens; int32[B], classes
    weights: Any = None  # float32 shaped as targets, 1 where the loss counts; None: everywhere
    segments: Any = None  # int32[B, T], a number for each sequence packed into a row
    types: Any = None  # int32[B, T], 0 in a first sentence and 1 in a second


def next_tokens(tokens_BxT1: Any, weights: Any = None) -> Batch:
    """The batch of a language model: each token is to be named from those before it.

    >>> import numpy as np
    >>> next_tokens(np.array([[5, 6, 7]])).targets
    array([[6, 7]])
    """
    return Batch(tokens_BxT1[:, :-1], tokens_BxT1[:, 1:], weights)
