"""Errors that name the cause and the cure, shared by the transforms."""

from typing import Any

import jax
import numpy as np
import optax


def in_range(name: str, value: Any, low: float, high: float, *, open_high: bool = False) -> None:
    """Refuses a Python number outside the range; traced values pass (`inject_hyperparams`)."""
    if not isinstance(value, int | float | np.number):
        return
    if not (low <= value < high if open_high else low <= value <= high):
        bracket = ")" if open_high else "]"
        raise ValueError(f"{name}={value} is outside [{low}, {high}{bracket}.")


def decays(**values: Any) -> None:
    """Refuses decays of averages outside [0, 1)."""
    for name, value in values.items():
        in_range(name, value, 0, 1, open_high=True)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")


def positive_integer(name: str, value: Any, cure: str = "") -> None:
    """Refuses a Python number that is not an integer of at least 1."""
    if isinstance(value, int | float | np.number) and (int(value) != value or value < 1):
        raise ValueError(f"{name}={value} must be an integer of at least 1. {cure}".rstrip())


def nonzero(name: str, value: Any, reason: str) -> None:
    """Refuses a Python number that is zero."""
    if isinstance(value, int | float | np.number) and value == 0:
        raise ValueError(f"{name}=0: {reason}")


def given(owner: str, name: str, value: Any, cure: str) -> None:
    if value is None:
        raise ValueError(f"{owner} needs `{name}`, which was not passed. {cure}")


def unmasked(owner: str, params: optax.Params) -> None:
    """Refuses params with holes: the loss of a masked tree cannot be evaluated."""

    def is_hole(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
        raise ValueError(
            f"{owner} was given masked params (from optax.masked or optax.partition), on which "
            "the model cannot be evaluated. Compute the sample outside, on the whole params, and "
            "pass it: `tx.update(grads, state, params, hessian=sample)`, with the wrapper made "
            "with `mask_compatible_extra_args=True` so that it masks `hessian` like the gradient. "
            "Where params is a single array, wrap it in a dict first."
        )


def same_shapes(name: str, tree: Any, like: Any) -> None:
    """Refuses a tree that differs from `like` in structure or in the shape of a leaf."""
    have, want = jax.tree.structure(tree), jax.tree.structure(like)
    if have != want:
        raise ValueError(
            f"`{name}` must have the structure of the gradients {want}, but it has {have}. Under "
            "optax.masked or optax.partition, make the wrapper with "
            "`mask_compatible_extra_args=True`, which masks both alike."
        )
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(like), strict=True
    ):
        if jax.numpy.shape(leaf) != jax.numpy.shape(other):
            raise ValueError(
                f"`{name}` has shape {jax.numpy.shape(leaf)} at {jax.tree_util.keystr(path)}, "
                f"where the gradient has {jax.numpy.shape(other)}."
            )
