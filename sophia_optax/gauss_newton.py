"""Gauss-Newton-Bartlett: the Gauss-Newton diagonal from labels that the model draws itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax import _checks
from sophia_optax.curvature import (
    AxisName,
    Estimator,
    SharingEstimator,
    Tree,
    across,
    batch_size,
    check_fraction,
    check_params,
    every_nth_row,
    mean_over_samples,
    sum_over,
    varying,
    widen,
)
from sophia_optax.likelihood import SAMPLED_LOSSES, logits_pass, user_pass


def gauss_newton_bartlett(
    *,
    likelihood: str = "categorical",
    groups: int = 1,
    batch_fraction: float = 1.0,
    num_samples: int = 1,
    shards: int = 1,
) -> Estimator:
    r"""Gauss-Newton-Bartlett estimator of the diagonal of the Gauss-Newton matrix.

        h = (1/B) Σ_m s_m ⊙ s_m,    B = Σ w

    Labels are drawn from the model's own predictions; s_m is the gradient of the summed loss of
    group m on them, each output's cotangent times sqrt(w). One group is the paper's B ĝ ⊙ ĝ,
    whose relative variance is about 2 whatever the batch. More groups cost the same number of
    floating-point operations, stay unbiased, and divide the variance by up to their number.

    Args:
      likelihood: "categorical" (softmax over the last axis, which B does not count), "bernoulli"
        (element-wise sigmoid, B counts elements), or "gaussian" (½ Σ (y-f)² over the last axis,
        unit variance, B counts the leading elements).
      groups: number of equal sets of consecutive rows that are squared apart; needs `inputs`.
      batch_fraction: share of the rows of `inputs` that are used: every n-th row,
        n = round(1 / fraction).
      num_samples: independent draws of all labels, averaged in one sample; each costs a backward
        pass, after one forward pass.
      shards: how many groups run side by side; set it to the number of devices over which the
        batch is sharded. It changes where the work is done, never h.

    Extra arguments of `update`:
      logits_fn: `params -> float[B, ..., V]`, or `(params, inputs)` when `inputs` is passed.
      sampled_loss_fn: instead of `logits_fn`, `(params, inputs, key) -> (summed loss on labels
        drawn from the model, number of counted outputs)`, for losses that never hold all logits;
        it weighs its own outputs, each cotangent times sqrt(w).
      inputs: pytree whose leaves lead with the batch axis.
      weights: `float[B, ...]` shaped as what B counts, 1 where an output counts, 0 for padding;
        default all ones.

    Returns:
      An estimator, which `value_grad_and_hessian` takes if `batch_fraction` is 1. Labels are
      functions of (key, row), groups of rows: neither the mesh nor the number of groups changes
      which labels are drawn (a `sampled_loss_fn` gets a key for each group instead). Under
      `axis_name` each shard groups its own rows, and squares and B are summed over the shards. If
      nothing is counted (B = 0) the sample is not finite and `hessian_estimate` rejects it. On a
      mesh with explicit axes, wrap the call in `jax.sharding.auto_axes`.

    Raises:
      ValueError: an argument is out of range; neither function is passed; `groups` or
        `batch_fraction` without `inputs`; rows that do not divide into groups; `weights` of a
        wrong shape; params are masked.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 2, extended to groups and weights.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[1.], [2.], [3.], [4.]])
    >>> logits_fn = lambda params, x: x * params                 # Bernoulli: diag = mean p(1-p)x²
    >>> gnb = gauss_newton_bartlett(likelihood="bernoulli", groups=4, num_samples=4000)
    >>> h = gnb(jax.random.key(0), jnp.zeros(1), None, logits_fn=logits_fn, inputs=x)
    >>> print(jnp.round(h, 1))                                   # 0.25 * (1 + 4 + 9 + 16) / 4
    [1.9]
    """
    _checks.one_of("likelihood", likelihood, tuple(SAMPLED_LOSSES))
    for name, value in (("groups", groups), ("num_samples", num_samples), ("shards", shards)):
        _checks.positive_integer(name, value)
    check_fraction(batch_fraction)
    if groups % shards:
        raise ValueError(f"groups={groups} must be a multiple of shards={shards}.")

    def differentiate(key, params, forward, rows, axis_name):
        """(means of the true loss as in `Pass`, auxiliary output, h)."""
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        def group(rows):
            draw, true, aux = forward(params, rows)

            def square(key):
                s, count = draw(key)
                return jax.tree.map(lambda s: jnp.square(widen(s)), s), count

            return (true, mean_over_samples(square, key, num_samples, axis_name)), aux

        sums, aux = _sum_over_groups(group, rows, groups, shards, axis_name)
        true, (squares, count) = across(jax.lax.psum, sums, axis_name)
        return true, aux, jax.tree.map(lambda s: s / count.astype(s.dtype), squares)

    def estimator(
        key,
        params,
        updates,
        *,
        logits_fn=None,
        sampled_loss_fn=None,
        inputs=None,
        weights=None,
        axis_name=None,
        **unused,
    ):
        del updates, unused
        check_params("gauss_newton_bartlett", params)
        if sampled_loss_fn is None:
            forward = logits_pass(likelihood, logits_fn)
        else:
            forward = user_pass(sampled_loss_fn, weights)
        rows = _rows(inputs, weights, groups, batch_fraction)
        return differentiate(key, varying(params, axis_name), forward, rows, axis_name)[2]

    def with_gradient(
        key,
        params,
        *,
        has_aux,
        loss_fn=None,
        logits_fn=None,
        sampled_loss_fn=None,
        inputs=None,
        weights=None,
        axis_name=None,
        **unused,
    ):
        del unused
        check_params("gauss_newton_bartlett", params)
        _check_loss_fn(loss_fn, sampled_loss_fn)
        forward = logits_pass(likelihood, logits_fn, loss_fn, has_aux)
        rows = _rows(inputs, weights, groups, batch_fraction)
        here = varying(params, axis_name)
        (loss, weight, gradient), aux, h = differentiate(key, here, forward, rows, axis_name)

        def mean(g, p):
            return (g / weight.astype(g.dtype)).astype(p.dtype)

        return (loss / weight, aux), jax.tree.map(mean, gradient, params), h

    return SharingEstimator(estimator, with_gradient) if batch_fraction == 1 else estimator


def _check_loss_fn(loss_fn: Any, sampled_loss_fn: Any) -> None:
    if sampled_loss_fn is not None:
        raise ValueError(
            "a `sampled_loss_fn` makes a forward pass of its own, which nothing can share. Call "
            "`jax.value_and_grad` and let `update` take the sample, or pass `logits_fn` instead."
        )
    _checks.given(
        "value_grad_and_hessian with gauss_newton_bartlett",
        "loss_fn",
        loss_fn,
        "Pass `loss_fn=lambda outputs, inputs: ...`, the true loss of each output of `logits_fn` "
        "(without `inputs`: `lambda outputs: ...`).",
    )


def _rows(inputs: Tree, weights: Any, groups: int, fraction: float) -> tuple[Tree, Any, Any]:
    """(inputs, weights, row numbers) of the sub-batch; row numbers are those of the full batch."""
    if inputs is None:
        if groups > 1 or fraction != 1:
            raise ValueError(
                f"gauss_newton_bartlett(groups={groups}, batch_fraction={fraction}) cuts rows "
                "from `inputs`, which was not passed. Pass `inputs=batch` and "
                "`logits_fn=lambda params, inputs: ...`."
            )
        return None, weights, None
    numbers = jnp.arange(batch_size((inputs, weights)))
    rows = every_nth_row((inputs, weights, numbers), fraction)
    if len(rows[2]) % groups:
        raise ValueError(
            f"{len(rows[2])} rows (of {len(numbers)}, batch_fraction={fraction}) do not divide "
            f"into groups={groups}. Choose a number of groups that divides the rows."
        )
    return rows


def _sum_over_groups(
    function: Callable[[Tree], tuple[Tree, Tree]],
    rows: Tree,
    groups: int,
    shards: int,
    axis_name: AxisName,
) -> tuple[Tree, Tree]:
    """Side by side over shards, one after the other inside a shard: (sums, outputs by row).

    A scan over all groups would gather every group onto every device.
    """
    if groups == 1:
        return function(rows)
    cut = jax.tree.map(lambda x: x.reshape(shards, groups // shards, -1, *x.shape[1:]), rows)
    sums, aux = jax.vmap(functools.partial(sum_over, function, axis_name=axis_name))(cut)
    return jax.tree.map(lambda s: jnp.sum(s, 0), sums), _by_row(aux, batch_size(rows), groups)


def _by_row(aux: Tree, number: int, groups: int) -> Tree:
    """Joins the groups, [shards, groups / shards, rows / groups, ...] to [rows, ...]."""
    shapes = jax.tree.map(lambda x: x.shape[2:], aux)
    if any(x.shape[2:3] != (number // groups,) for x in jax.tree.leaves(aux)):
        raise ValueError(
            f"with groups={groups} the auxiliary output of `loss_fn` must lead with the rows of a "
            f"group, {number // groups}, but its shapes are {shapes}: what is not of a row cannot "
            "be joined."
        )
    return jax.tree.map(lambda x: x.reshape(number, *x.shape[3:]), aux)
