"""The order of a classifier's classes, when it starts from another classifier."""

from collections.abc import Sequence
from typing import Any


def order(ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
    """For each of our classes its index among theirs; None if they are other classes.

    Classes are matched by name, or by index if the names of one side are only numbers or LABEL_0,
    LABEL_1, ...

    >>> order(("bad", "good"), ("good", "bad"))
    [1, 0]
    >>> order(("0", "1"), ("good", "bad"))
    [0, 1]
    >>> order(("bad", "good"), ("true", "false")) is None
    True
    """
    if len(ours) != len(theirs):
        return None
    if len(set(theirs)) == len(theirs) and set(ours) == set(theirs):
        return [theirs.index(name) for name in ours]
    return list(range(len(ours))) if _numbered(ours) or _numbered(theirs) else None


def _numbered(names: Sequence[str]) -> bool:
    numbers = range(len(names))
    return list(names) in ([str(i) for i in numbers], [f"LABEL_{i}" for i in numbers])


def permuted(params: Any, numbers: Sequence[int]) -> Any:
    """A classifier's parameters, reordered: class i is the former class `numbers[i]`."""
    head = params["head"]
    last = {name: head[name][..., list(numbers)] for name in ("out", "out_bias")}
    return {**params, "head": {**head, **last}}
