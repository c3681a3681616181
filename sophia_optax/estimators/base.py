"""The protocol of estimators, which return one sample of the diagonal of the curvature.

An estimator is a pure function `(key, params, updates, **extra) -> h`. h is shaped as params,
float32 or wider, in units of loss / parameter². `hessian_estimate` decides when samples are taken
and how they are averaged.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax

from sophia_optax import checks
from sophia_optax.sharding import AxisName, Tree, sum_over

_MISSING: Any = object()


class Estimator(Protocol):
    """A function that returns one sample of diag H; `hessian_estimate` calls it.

    Args:
      key: a typed PRNG key, a new one for each sample.
      params: the parameters.
      updates: the incoming gradient, shaped as params.
      **extra: the extra arguments of `update`, and `axis_name`. An estimator ignores those that it
        does not know.

    Returns:
      One sample, shaped as params, float32 or wider, in units of loss / parameter².

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
    """An estimator of this library; some also return the loss and its gradient."""

    name: str
    sample: Estimator
    with_gradient: Callable[..., tuple[Any, Tree, Tree]] | None = None
    """`(key, params, *, has_aux, has_state, **extra) -> ((loss, aux, state), gradient, h)`, for
    `value_grad_and_hessian`."""

    def __call__(
        self, key: Any, params: Any = _MISSING, updates: Any = _MISSING, **extra: Any
    ) -> optax.Updates:
        if updates is _MISSING:
            raise TypeError(
                f"the estimator {self.name}(...) was called with one argument, as a schedule is. "
                "optax.inject_hyperparams treats every callable as a schedule unless you list it: "
                '`static_args=("estimator", "weight_decay_mask")`.'
            )
        return self.sample(key, params, updates, **extra)


def check_estimator(estimator: Any) -> None:
    """Rejects an argument that cannot be called as (key, params, updates)."""
    if checks.takes_positional(estimator, 3):
        return
    name = getattr(estimator, "__name__", repr(estimator))
    raise TypeError(
        f"estimator={name} cannot be called as (key, params, updates, **extra). Pass what the "
        "factory returns, such as `estimator=hutchinson()` with its parentheses, or a function of "
        "that form."
    )


def mean_over_samples(
    sample: Callable[[jax.Array], Tree],
    key: jax.Array,
    num_samples: int,
    axis_name: AxisName = None,
) -> Tree:
    """The mean of `sample` over `num_samples` keys split from `key`; a single sample uses `key`."""
    if num_samples == 1:
        return sample(key)
    keys = jax.random.split(key, num_samples)
    total, _ = sum_over(lambda key: (sample(key), None), keys, axis_name)
    return jax.tree.map(lambda s: s / num_samples, total)


def check_params(owner: str, params: optax.Params) -> None:
    """Rejects params that are missing or masked."""
    checks.given(owner, "params", params, "Call `tx.update(grads, state, params, ...)`.")
    checks.unmasked(owner, params)
