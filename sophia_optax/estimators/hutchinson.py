"""Hutchinson: the Hessian diagonal from products of the Hessian with random probes."""

import functools
from collections.abc import Callable

import jax

from sophia_optax import checks
from sophia_optax.estimators.base import Estimator, Sampler
from sophia_optax.estimators.hutchinson_sample import (
    OWNER,
    Settings,
    sample,
    sample_with_gradient,
)
from sophia_optax.estimators.rows import check_fraction
from sophia_optax.sharding import Tree


def hutchinson(
    *,
    probe: str | Callable[[jax.Array, Tree], Tree] = "rademacher",
    num_samples: int = 1,
    groups: int = 1,
    batch_fraction: float = 1.0,
    mode: str = "forward",
) -> Estimator:
    r"""Hutchinson's estimator of the diagonal of the Hessian.

        h = (1/G) Σ_g u_g ⊙ (H_g u_g)

    H_g is the Hessian of the mean loss of group g, and u_g a random probe. h is unbiased for
    diag H. With one group, the paper's h = u ⊙ (H u), the variance of coordinate i is Σ_{j≠i} H_ij²
    with Rademacher probes; normal probes add 2 H_ii². G groups take the same number of
    floating-point operations, and their variance is 1/G² of the sum over the groups: 1/G of the
    variance with one group, where the groups agree about H. On a small trained GPT the total
    relative squared error of a sample of 480 rows is .34 with one row per group, and 9.4 with one
    group.

    Args:
      probe: "rademacher" (default) or "normal", the paper's. Or a function `(key, params) -> u`
        with u shaped as params, of mean 0, unit variance and uncorrelated coordinates; use one if
        probes must not depend on how the parameters are arranged.
      num_samples: independent probes, averaged into one sample. They share one evaluation of the
        gradient; each costs a Hessian-vector product.
      groups: number of equal groups of rows, each with its own probe, evaluated one after the
        other; more than 1 needs `inputs` and an `obj_fn` that weighs all rows alike. Group g has
        the rows g, g + G, ..., so each shard of a batch has its part of every group. The probe
        comes from the key `fold_in(key, n)`, with n the smallest row number of the group; the
        group of row 0 uses the key itself.
      batch_fraction: fraction of the rows of `inputs` that are sampled: every n-th row,
        n = round(1 / batch_fraction).
      mode: "forward" (jvp of the gradient), or "reverse" (vjp of the gradient) for losses with a
        nested `custom_vjp`, for which jax refuses the former ("can't apply forward-mode autodiff").

    Extra arguments of `update`:
      obj_fn: `params -> scalar`, the mean loss on this step's batch without auxiliary output;
        `(params, inputs) -> scalar` if `inputs` is passed.
      inputs: pytree whose leaves lead with the batch axis; needed if `batch_fraction` < 1 or
        `groups` > 1. A leaf may also be a typed PRNG key of shape (), for dropout: each group gets
        a key of its own from it.
      row_numbers: `int32[B]`, 0, 1, ... by default: the numbers of the rows in a batch that is
        evaluated in parts with one key. If part i of K equal parts has the rows i, i + K, ..., and
        each is cut into G / K groups, the mean of the K samples equals the sample of the whole
        batch with G groups, to rounding.

    Returns:
      An estimator, which `value_grad_and_hessian` accepts; the two share work if `batch_fraction`
      and `groups` are 1.
      Under `axis_name` all shards use one probe, and H u is averaged over them. `obj_fn` is then
      the mean loss of the shard's own rows, without collectives.

    Raises:
      ValueError: an argument is out of range; `obj_fn` or `params` is missing; params are masked;
        `groups` does not divide the rows; `row_numbers` has a wrong shape.
      TypeError: `obj_fn` returns more than a scalar.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 1, but with Rademacher instead of normal
    probes, because their variance is never larger; groups are ours.

    >>> import jax, jax.numpy as jnp
    >>> f = lambda x: x[0] ** 2 + 3 * x[1] ** 2       # diag H = (2, 6), no off-diagonal terms
    >>> x = jnp.ones(2)
    >>> print(hutchinson()(jax.random.key(0), x, None, obj_fn=f))
    [2. 6.]
    """
    if not callable(probe):
        checks.one_of("probe", probe, ("rademacher", "normal"))
    checks.one_of("mode", mode, ("forward", "reverse"))
    for name, value in (("num_samples", num_samples), ("groups", groups)):
        checks.positive_integer(name, value)
    check_fraction(batch_fraction)
    settings = Settings(probe, num_samples, groups, batch_fraction, mode)
    return Sampler(
        OWNER,
        functools.partial(sample, settings),
        functools.partial(sample_with_gradient, settings),
    )
