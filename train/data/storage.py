"""Conversion of tokens to narrower integer types, in one place: no number ever wraps around."""

from typing import Any

import numpy as np


def narrow(numbers: Any, dtype: Any, what: str) -> np.ndarray:
    """Integers as an array of an integer type that holds each of them.

    Args:
      numbers: an array or a sequence of integers of at most 64 bits.
      dtype: the integer type of the result.
      what: where the numbers are from; messages begin with it.

    Raises:
      ValueError: a number is outside the range of the type, or not an integer.

    >>> narrow([1, 255], np.uint8, "a.bin").tolist()
    [1, 255]
    >>> narrow([1, 300], np.uint8, "a.bin")
    Traceback (most recent call last):
    ...
    ValueError: a.bin: number 1 is 300, but uint8 reaches from 0 to 255: it needs a wider type.
    """
    array, target = np.asarray(numbers), np.dtype(dtype)
    if array.size == 0 or np.can_cast(array.dtype, target):
        return array.astype(target, copy=False)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what}: {array.dtype} values are not integers of at most 64 bits.")
    reach = np.iinfo(target)
    low, high = int(array.min()), int(array.max())
    if low < reach.min or high > reach.max:
        wrong = array < reach.min if low < reach.min else array > reach.max
        place = int(np.argmax(wrong))
        raise ValueError(
            f"{what}: number {place} is {int(array.flat[place])}, but {target} reaches from "
            f"{reach.min} to {reach.max}: it needs a wider type."
        )
    return array.astype(target, copy=False)


def smallest(count: int) -> np.dtype:
    """The smallest unsigned type that holds every number below `count`.

    >>> smallest(256), smallest(257)
    (dtype('uint8'), dtype('uint16'))
    """
    return np.min_scalar_type(max(count - 1, 0))
