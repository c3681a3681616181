"""Checks of arguments and trees, whose errors name the cause and the cure."""

import inspect
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sophia_optax.numerics import accumulation_dtype


def known_number(value: Any) -> float | None:
    """The value as a float; None if it is traced (`inject_hyperparams`) or a schedule."""
    if isinstance(value, int | float | np.number):
        try:
            return float(value)
        except OverflowError:  # an integer beyond every float
            return math.inf if value > 0 else -math.inf
    known = isinstance(value, jax.Array | np.ndarray) and not isinstance(value, Tracer)
    return float(value) if known and value.ndim == 0 else None


def _not_a_schedule(name: str, value: Any) -> None:
    """Rejects a schedule, None and strings."""
    if callable(value):
        raise TypeError(
            f"{name} is a function, but only learning_rate and weight_decay take schedules. Wrap "
            f"the optimizer: `optax.inject_hyperparams(...)(..., {name}=schedule)`."
        )
    real_number(name, value)


def real_number(name: str, value: Any) -> None:
    """Rejects None and strings."""
    if value is None or isinstance(value, str):
        raise TypeError(f"{name}={value!r} is not a number.")


def in_range(name: str, value: Any, low: float, high: float, *, open_high: bool = False) -> None:
    """Rejects NaN and numbers outside the range."""
    _not_a_schedule(name, value)
    number = known_number(value)
    if number is None:
        return
    if not (low <= number < high if open_high else low <= number <= high):
        bracket = ")" if open_high else "]"
        raise ValueError(f"{name}={value} is outside [{low}, {high}{bracket}.")


def finite(**values: Any) -> None:
    """Rejects NaN and infinite numbers."""
    for name, value in values.items():
        number = known_number(value)
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{name}={value} is not finite: training would end in NaN.")


def positive(name: str, value: Any) -> None:
    """Rejects a number that is not positive and finite."""
    number = known_number(value)
    if number is not None and not 0 < number < math.inf:
        raise ValueError(f"{name}={value} must be above 0 and finite.")


def decays(**values: Any) -> None:
    """Rejects decays outside [0, 1), also those that are 1 after the cast to float32."""
    dtype = jnp.result_type(float)
    for name, value in values.items():
        in_range(name, value, 0, 1, open_high=True)
        _below_one(name, value, dtype, "")


def decays_in_leaves(params: optax.Params, **values: Any) -> None:
    """Rejects decays that are 1 in the dtype in which some leaf is averaged."""
    for path, x in jax.tree.leaves_with_path(params):
        for name, value in values.items():
            _below_one(name, value, accumulation_dtype(x), f", in which {_named(path)} is averaged")


def _below_one(name: str, value: Any, dtype: jnp.dtype, where: str) -> None:
    number = known_number(value)
    if number is not None and not np.asarray(number).astype(dtype) < 1:
        raise ValueError(
            f"{name}={value} is 1 in {dtype.name}{where}: an average with it never moves, and its "
            "bias correction divides by 0. Choose at most "
            f"{1 - float(jnp.finfo(dtype).eps):.9g}."
        )


def _named(path: Any) -> str:
    return f"params{jax.tree_util.keystr(path)}"


def real_leaves(owner: str, params: optax.Params) -> None:
    """Rejects leaves that are not real floating-point arrays of at least 2 bytes a number."""
    for path, x in jax.tree.leaves_with_path(params):
        try:
            dtype = jnp.result_type(x)
            kind = dtype.name
        except TypeError:  # not an array, but a string or a function
            dtype, kind = None, f"a {type(x).__name__}"
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1:
            continue
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            cure = (
                "So few bits round steps away: keep the parameter as bfloat16 or float32, and cast "
                "it in the model."
            )
        elif dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
            cure = (
                "Keep its real and imaginary parts as two real leaves, and join them in the model "
                "with `jax.lax.complex`. If the optimizer reads only the gradient, "
                "optax.contrib.split_real_and_imaginary does that."
            )
        else:
            cure = (
                "It cannot be trained, and weight decay would change it: keep it out of params "
                "(close over it in the model), or replace it with None."
            )
        raise ValueError(f"{owner}: {_named(path)} is {kind}. {cure}")


def real_numbers(what: str, tree: Any) -> None:
    """Rejects a tree with complex leaves, whose imaginary parts real parameters would drop."""
    for path, x in jax.tree.leaves_with_path(tree):
        dtype = jax.typeof(x).dtype
        if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)):
            where = jax.tree_util.keystr(path) or "its root"
            raise ValueError(
                f"{what} is {dtype.name} at {where}, but parameters and their updates are real. "
                "Take its real part first."
            )


def momentum_dtype(name: str, dtype: Any) -> None:
    """Rejects dtypes in which an average of gradients would not move."""
    known = _dtype(name, dtype)
    if known is not None and (not jnp.issubdtype(known, jnp.floating) or known.itemsize < 2):
        raise ValueError(
            f"{name}={known.name} cannot hold an average of gradients: the average would not move, "
            "or not be real. Choose 'bfloat16', 'float16', 'float32' or 'float64', or None for the "
            "parameter's dtype."
        )


def curvature_dtype(name: str, dtype: Any) -> None:
    """Rejects dtypes that cannot hold curvature."""
    known = _dtype(name, dtype)
    if known is not None and known not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise ValueError(
            f"{name}={known.name} cannot hold curvature: float16 overflows, and in shorter formats "
            "the average stalls. Choose 'bfloat16', 'float32' or 'float64'."
        )


def _dtype(name: str, dtype: Any) -> Any:
    """The argument as a dtype; None stays None."""
    if dtype is None:
        return None
    try:
        return jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"{name}={dtype!r} is not a dtype ({error}).") from error


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Rejects a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")


def positive_integer(name: str, value: Any, cure: str = "") -> None:
    """Rejects a number that is not an integer of at least 1."""
    _not_a_schedule(name, value)
    number = known_number(value)
    if number is not None and not (number >= 1 and number.is_integer()):
        raise ValueError(f"{name}={value} must be an integer of at least 1. {cure}".rstrip())


def nonzero(name: str, value: Any, reason: str) -> None:
    """Rejects zero."""
    if known_number(value) == 0:
        raise ValueError(f"{name}=0: {reason}")


def given(owner: str, name: str, value: Any, cure: str) -> Any:
    """Returns the value, or raises a ValueError if it is None."""
    if value is None:
        raise ValueError(f"{owner} needs `{name}`, which was not passed. {cure}")
    return value


def unmasked(owner: str, params: optax.Params) -> None:
    """Rejects masked params, on which the loss cannot be evaluated."""

    def is_hole(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
        raise ValueError(
            f"{owner} received masked params (from optax.masked or optax.partition), on which the "
            "model cannot be evaluated. Take the sample outside, on the whole params, and pass "
            "it: `tx.update(grads, state, params, hessian=sample)`. Make the wrapper with "
            "`mask_compatible_extra_args=True`, so that it masks `hessian` like the gradient. If "
            "params is a single array, wrap it in a dict first."
        )


def takes_positional(function: Any, number: int) -> bool:
    """Whether `function` can be called with `number` positional arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind_partial(*range(number))
    except TypeError:
        return False
    except ValueError:  # some builtins have no signature
        return True
    return True


def same_shapes(name: str, tree: Any, like: Any) -> None:
    """Rejects a tree that differs from `like` in structure or in the shape of a leaf."""
    have, want = jax.tree.structure(tree), jax.tree.structure(like)
    if have != want:
        raise ValueError(
            f"`{name}` must have the structure of the gradient, {want}, but it has {have}. Under "
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


def renamed(owner: str, old: str, value: Any, new: str, current: Any, default: float) -> Any:
    """The value of a number that may be passed under its deprecated name, with a warning."""
    if value is None:
        return current
    if known_number(current) != default:
        raise TypeError(
            f"{new}={current} was passed together with {old}={value}, its deprecated name. Drop "
            f"`{old}`."
        )
    warnings.warn(
        f"{owner}({old}=...) is deprecated: the argument is now `{new}`.",
        DeprecationWarning,
        stacklevel=3,
    )
    return value
