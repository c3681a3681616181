"""Estimators: one sample of the diagonal of the curvature.

An estimator is a pure function `(key, params, updates, **extra) -> h`; h is shaped as params,
float32 at least, in units of loss / parameter². `hessian_estimate` decides when to take samples
and how to average them.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.sharding import AxisName, Tree, varying, varying_like

_MISSING: Any = object()


class Estimator(Protocol):
    """What `hessian_estimate` calls: one sample of diag H.

    Args:
      key: a typed PRNG key, another one for each sample.
      params: the parameters.
      updates: the incoming gradient, shaped as params.
      **extra: the extra arguments of `update`, and `axis_name`; unknown ones are ignored.

    Returns:
      One sample, shaped as params, float32 at least.

    >>> import jax, jax.numpy as jnp
    >>> def absolute(key, params, updates, **unused):
    ...     return jax.tree.map(jnp.abs, updates)
    >>> print(absolute(jax.random.key(0), None, jnp.array([1., -2.])))
    [1. 2.]
    """

    def __call__(
        self, key: jax.Array, params: optax.Params | None, updates: optax.Updates, **extra: Any
    ) -> optax.Updates: ...


@dataclasses.dataclass(frozen=True)
class Sampler:
    """An estimator of ours; some can also give the loss and its gradient in the same pass."""

    name: str
    sample: Estimator
    with_gradient: Callable[..., tuple[Any, Tree, Tree]] | None = None
    """`(key, params, *, has_aux, has_state, **extra) -> (loss and what is beside it, gradient, h)`,
    of `value_grad_and_hessian`."""

    def __call__(
        self, key: Any, params: Any = _MISSING, updates: Any = _MISSING, **extra: Any
    ) -> optax.Updates:
        if updates is _MISSING:
            raise TypeError(
                f"the estimator {self.name}(...) was called with one argument, as a schedule is. "
                "optax.inject_hyperparams takes every callable for a schedule: list it, "
                '`static_args=("estimator", "weight_decay_mask")`.'
            )
        return self.sample(key, params, updates, **extra)


def check_estimator(estimator: Any) -> None:
    """Refuses what cannot be called as an estimator is."""
    if _takes(estimator, 3):
        return
    name = getattr(estimator, "__name__", repr(estimator))
    raise TypeError(
        f"estimator={name} cannot be called as (key, params, updates, **extra). Pass what the "
        "factory returns, such as `estimator=hutchinson()` with its parentheses, or a function of "
        "that form."
    )


def check_denominator(denominator: Any, factories: tuple[Any, ...]) -> None:
    """Refuses what cannot be called with (h, v), and the factories of denominators."""
    if _takes(denominator, 2) and denominator not in factories:
        return
    name = getattr(denominator, "__name__", repr(denominator))
    raise TypeError(
        f"denominator={name} cannot be called as (h, v), the curvature and the second moment of "
        "the gradient. Pass what a factory returns, such as `floor(.01, 1e-12)`, or "
        "`lambda h, v: ...`, which need not read v."
    )


def _takes(function: Any, number: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind_partial(*range(number))
    except TypeError:
        return False
    except ValueError:  # some builtins have no signature
        return True
    return True


def mean_over_samples(
    sample: Callable[[jax.Array], Tree],
    key: jax.Array,
    num_samples: int,
    axis_name: AxisName = None,
) -> Tree:
    """The mean of `sample` at `num_samples` keys; one key is used as it is."""
    if num_samples == 1:
        return sample(key)
    keys = jax.random.split(key, num_samples)
    total, _ = sum_over(lambda key: (sample(key), None), keys, axis_name)
    return jax.tree.map(lambda s: s / num_samples, total)


def sum_over(
    function: Callable[[Any], tuple[Tree, Tree]], xs: Any, axis_name: AxisName = None
) -> tuple[Tree, Tree]:
    """(sum of the first results, all second results) over the rows of `xs`, one by one."""
    shapes, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], xs))
    zeros = varying(jax.tree.map(_zeros, shapes), axis_name)

    def add(total, x):
        part, kept = function(x)
        return optax.tree.add(total, part), kept

    return jax.lax.scan(add, zeros, xs)


def check_params(owner: str, params: optax.Params) -> None:
    checks.given(owner, "params", params, "Call `tx.update(grads, state, params, ...)`.")
    checks.unmasked(owner, params)


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros that lie as what is added to them does, on explicit and on manual axes."""
    return varying_like(jnp.zeros(shape.shape, shape.dtype, out_sharding=shape.sharding), shape)
