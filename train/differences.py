"""Which fields of two nested settings differ."""

from collections.abc import Mapping
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines "name old -> new". A field that only one of the two has came or went with the code.

    >>> differences({"optim": {"gamma": 0.1, "eps": 1}}, {"optim": {"gamma": 0.2, "eps": 1}})
    ['optim.gamma 0.1 -> 0.2']
    """
    old, new = _flat(before), _flat(now)
    return [f"{k} {old[k]} -> {new[k]}" for k in old if k in new and old[k] != new[k]]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
