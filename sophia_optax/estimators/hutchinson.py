"""Hutchinson: the Hessian diagonal from products of the Hessian with random probes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.estimators.base import (
    Estimator,
    Sampler,
    check_params,
    mean_over_samples,
)
from sophia_optax.estimators.rows import (
    batch_size,
    check_fraction,
    check_groups,
    every_nth_row,
    in_sets,
    numbers_of,
)
from sophia_optax.numerics import widen
from sophia_optax.sharding import AxisName, Tree, across, check_named, sum_over, varying


def hutchinson(
    *,
    probe: str | Callable[[jax.Array, Tree], Tree] = "rademacher",
    num_samples: int = 1,
    groups: int = 1,
    batch_fraction: float = 1.0,
    mode: str = "forward",
) -> Estimator:
    r"""Hutchinson's estimator of the diagonal of the Hessian: h = (1/G) Σ_g u_g ⊙ (H_g u_g).

    H_g is the Hessian of the mean loss of group g. Unbiased for diag H. With one group, the
    paper's h = u ⊙ (H u), the variance of a coordinate is Σ_{j≠i} H_ij² with Rademacher probes;
    normal probes add 2 H_ii². With G groups it is 1/G² of the sum over groups: where groups agree
    about H, the G-th part, at the same number of floating-point operations: on a small trained
    GPT a sample of 480 rows is off by .34 with a group a row, by 9.4 with one (total relative
    squared error).

    Args:
      probe: "rademacher" (default) or "normal", the paper's; or `(key, params) -> u`, shaped as
        params, of mean 0, unit variance and uncorrelated coordinates: for draws that do not depend
        on how parameters are arranged.
      num_samples: independent probes averaged in one sample; each costs a Hessian-vector product,
        after one evaluation of the gradient.
      groups: number of equal sets of rows, each with a probe of its own, one after the other;
        needs `inputs` and an `obj_fn` that weighs all rows alike. Set g has the rows g, g + G,
        ..., so that each shard of a batch has its part of each set. Its probe is of the key
        `fold_in(key, n)`, n the smallest number of its rows; the set of row 0 takes the key itself.
      batch_fraction: share of the rows of `inputs` that the Hessian is taken of: every n-th row,
        n = round(1 / fraction).
      mode: "forward" (jvp of the gradient) or "reverse" (vjp of the gradient), for losses with
        nested `custom_vjp`, on which jax refuses the former ("can't apply forward-mode autodiff").

    Extra arguments of `update`:
      obj_fn: `params -> scalar`, the mean loss of this step's batch and nothing else;
        `(params, inputs) -> scalar` when `inputs` is passed.
      inputs: pytree whose leaves lead with the batch axis; needed if `batch_fraction` < 1 or
        `groups` > 1. A leaf may also be a typed PRNG key of shape (), for dropout: sets get keys of
        their own from it.
      row_numbers: `int32[B]`, default 0, 1, ...: the rows' numbers in a batch that is evaluated
        in parts, each with the same key. The mean of the samples of K equal micro-batches, the
        i-th of rows i, i + K, ..., each in G / K sets, is then the sample of the whole batch in G
        sets, to rounding.

    Returns:
      An estimator, which `value_grad_and_hessian` takes: it shares work if `batch_fraction` and
      `groups` are 1.
      Under `axis_name` all shards use one probe, and H u is averaged over them: `obj_fn` is then
      the mean loss of a shard's own rows, free of collectives.

    Raises:
      ValueError: an argument is out of range; `obj_fn` or `params` is missing; params are masked;
        rows do not divide into groups; `row_numbers` of a wrong shape.
      TypeError: `obj_fn` returns more than a scalar.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 1, with Rademacher instead of normal
    probes because their variance is never larger; groups are ours.

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
    sampler = jax.random.rademacher if probe == "rademacher" else jax.random.normal

    def differentiate(gradient, key, params, axis_name):
        """(gradient, (loss, aux), h)."""
        here = varying(params, axis_name)

        def draw(key):
            if callable(probe):
                return probe(key, params)
            return optax.tree.random_like(key, params, sampler)

        def times(u, hu):
            hu = across(jax.lax.pmean, hu, axis_name)
            return jax.tree.map(lambda u, hu: widen(u) * widen(hu), u, hu)

        if mode == "forward" and num_samples == 1:  # jvp keeps nothing; linearize keeps residuals
            u = draw(key)
            grads, hu, value = jax.jvp(gradient, (here,), (varying(u, axis_name),), has_aux=True)
            return grads, value, times(u, hu)
        grads, product, value = _linearize(mode, gradient, here)

        def sample(key):
            u = draw(key)
            return times(u, product(varying(u, axis_name)))

        return grads, value, mean_over_samples(sample, key, num_samples)

    def sampled(key, params, obj_fn, inputs, row_numbers, axis_name, has_aux=False):
        """(None or (gradient, (loss, aux)) of the rows, h)."""

        def key_of(numbers):
            # A set is on all shards, and has one probe there.
            number = across(jax.lax.pmin, varying(numbers.min(), axis_name), axis_name)
            return jnp.where(number > 0, jax.random.fold_in(key, number), key)

        params = jax.tree.map(jnp.asarray, params)  # a parameter may be a number of Python
        if groups == 1:
            gradient = _gradient(obj_fn, params, inputs, batch_fraction, axis_name, has_aux)
            here = key if row_numbers is None else key_of(jnp.asarray(row_numbers))
            grads, value, h = differentiate(gradient, here, params, axis_name)
            return (grads, value), h

        def of_group(x):
            rows, numbers = x
            gradient = _gradient(obj_fn, params, rows, 1, axis_name, has_aux)
            return differentiate(gradient, key_of(numbers), params, axis_name)[2], None

        total, _ = sum_over(of_group, _every_nth_set(inputs, row_numbers, groups, batch_fraction))
        return None, optax.tree.scale(1 / groups, total)

    def estimator(
        key,
        params,
        updates,
        *,
        obj_fn=None,
        inputs=None,
        row_numbers=None,
        axis_name=None,
        **unused,
    ):
        del updates, unused
        return sampled(key, params, obj_fn, inputs, row_numbers, axis_name)[1]

    def with_gradient(
        key,
        params,
        *,
        has_aux,
        has_state,
        obj_fn=None,
        inputs=None,
        row_numbers=None,
        axis_name=None,
        **unused,
    ):
        del unused
        if has_state:
            raise TypeError(
                "has_state belongs to gauss_newton_bartlett, whose `logits_fn` has no other place "
                "for it. With hutchinson return the new state as the auxiliary output of `obj_fn`: "
                "has_aux=True."
            )
        whole, h = sampled(key, params, obj_fn, inputs, row_numbers, axis_name, has_aux)
        if whole is None or round(1 / batch_fraction) > 1:
            # Means of parts do not combine: `obj_fn` may weigh its rows.
            gradient = _gradient(obj_fn, params, inputs, 1, axis_name, has_aux)
            whole = gradient(varying(params, axis_name))
        grads, (loss, aux) = whole
        loss, grads = across(jax.lax.pmean, (loss, grads), axis_name)
        return (loss, aux, None), grads, h

    return Sampler("hutchinson", estimator, with_gradient)


def _linearize(mode: str, gradient: Callable, params: Tree) -> tuple[Tree, Callable, Any]:
    """(gradient, u -> H u, what the gradient has beside itself)."""
    if mode == "forward":
        return jax.linearize(gradient, params, has_aux=True)
    grads, pullback, beside = jax.vjp(gradient, params, has_aux=True)
    return grads, lambda u: pullback(u)[0], beside  # H is symmetric


def _every_nth_set(
    inputs: Tree, row_numbers: Any, groups: int, fraction: float
) -> tuple[Tree, jax.Array]:
    """(inputs, row numbers) [groups, rows / groups, ...] of a share, in sets of every n-th."""
    if inputs is None:
        raise ValueError(
            f"hutchinson(groups={groups}) cuts rows from `inputs`, which was not passed. Pass "
            "`inputs=batch` and `obj_fn=lambda params, inputs: ...`."
        )
    number = batch_size(inputs)
    rows = every_nth_row((inputs, numbers_of(row_numbers, number)), fraction)
    check_groups(len(rows[1]), number, fraction, groups)
    return in_sets(rows, groups)


def _gradient(
    obj_fn: Any,
    params: Tree,
    inputs: Tree,
    fraction: float,
    axis_name: AxisName,
    has_aux: bool = False,
) -> Callable[[Tree], tuple[Tree, tuple[jax.Array, Tree]]]:
    """`params -> (gradient, (loss, aux))` on a share of the rows."""
    checks.given(
        "hutchinson",
        "obj_fn",
        obj_fn,
        "Pass `obj_fn=lambda params: loss(params, batch)`, or a sample as `hessian=`.",
    )
    check_params("hutchinson", params)
    objective = _bind_inputs(obj_fn, inputs, fraction)
    loss = _check_scalar(objective, params, has_aux)
    check_named("hutchinson", loss, params, axis_name)

    def gradient(params):
        value, grads = jax.value_and_grad(objective, has_aux=has_aux)(params)
        return grads, value if has_aux else (value, None)

    return gradient


def _check_scalar(objective: Callable[[Tree], Any], params: optax.Params, has_aux: bool) -> Any:
    """The type of the loss."""
    loss = out = jax.eval_shape(objective, params)
    if has_aux:
        loss = out[0] if isinstance(out, tuple) and len(out) == 2 else None
    if isinstance(loss, jax.ShapeDtypeStruct) and loss.shape == ():
        return loss
    shapes = jax.tree.map(lambda x: x.shape, out)
    if has_aux:
        raise TypeError(
            "with has_aux=True `obj_fn` must return (scalar mean loss, auxiliary output), but it "
            f"returns {shapes}. Return such a pair, or leave has_aux out."
        )
    raise TypeError(
        "`obj_fn` must return the scalar mean loss and nothing else, but it returns "
        f"{shapes}. Drop the auxiliary output: `obj_fn=lambda params: loss_fn(params, batch)[0]`."
    )


def _bind_inputs(function: Callable, inputs: Tree, fraction: float) -> Callable:
    if inputs is not None:
        batch_size(inputs)
        return lambda params: function(params, every_nth_row(inputs, fraction))
    if fraction != 1:
        raise ValueError(
            f"hutchinson(batch_fraction={fraction}) cuts rows from `inputs`, which was not "
            "passed. Pass `inputs=batch` and `obj_fn=lambda params, inputs: ...`."
        )
    return function
