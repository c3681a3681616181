"""One Gauss-Newton-Bartlett sample: squared gradients of groups of rows, summed over the groups."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sophia_optax import checks
from sophia_optax.estimators.base import check_params, mean_over_samples
from sophia_optax.estimators.forward_pass import (
    LossAndGradient,
    Model,
    Pass,
    gradient_pass,
    logits_pass,
    user_pass,
)
from sophia_optax.estimators.row_groups import (
    check_aux_rows,
    in_parallel_groups,
    join_rows,
    mean_of_parts,
    mean_of_two_states,
    remaining_rows,
    sampled_rows,
    sum_over_groups,
    zero_unless,
)
from sophia_optax.estimators.rows import Rows, batch_size, check_stride
from sophia_optax.numerics import widen
from sophia_optax.sharding import (
    AxisName,
    Tree,
    across,
    check_named,
    explicit_mesh,
    manual_axes,
    mean_over_shards,
    varying,
)

OWNER = "gauss_newton_bartlett"
GROUP_AXIS = "sophia_optax.gauss_newton_bartlett"
"""Name of the axis of parallel groups under `jax.vmap`."""


class Settings(NamedTuple):
    """Arguments of `gauss_newton_bartlett`."""

    likelihood: str
    groups: int
    batch_fraction: float
    num_samples: int
    parallel_groups: int
    spmd_axis_name: AxisName
    variance: float

    @property
    def stride(self) -> int:
        """One row in `stride` is sampled."""
        return round(1 / self.batch_fraction)

    @property
    def idle_slots(self) -> bool:
        """Whether the last round of parallel groups has idle slots."""
        return self.groups % self.parallel_groups > 0


class Call(NamedTuple):
    """Arguments of one call."""

    key: jax.Array
    params: Tree  # marked as varying over `axis_name`
    batch: Rows  # all rows
    sampled: Rows  # the rows that are sampled
    axis_name: AxisName


class Evaluation(NamedTuple):
    """The results of one call, before loss and gradient are summed over shards."""

    loss_and_gradient: LossAndGradient | None
    aux: Tree
    state: Tree
    h: Tree


def sample(
    settings: Settings,
    key: jax.Array,
    params: Tree,
    updates: Any,
    *,
    logits_fn: Any = None,
    sampled_loss_fn: Any = None,
    inputs: Tree = None,
    weights: Any = None,
    row_numbers: Any = None,
    axis_name: AxisName = None,
    **unused: Any,
) -> Tree:
    """One sample of h."""
    del updates, unused
    check_params(OWNER, params)
    check_axes = functools.partial(check_named, OWNER, params=params, axis_name=axis_name)
    if sampled_loss_fn is None:
        forward = logits_pass(Model(settings.likelihood, logits_fn, check_axes, settings.variance))
    else:
        forward = user_pass(sampled_loss_fn, weights, check_axes)
    call = _call(settings, key, params, Rows(inputs, weights, row_numbers), axis_name)
    return _evaluate_groups(settings, call, forward).h


def sample_with_gradient(
    settings: Settings,
    key: jax.Array,
    params: Tree,
    *,
    has_aux: bool,
    has_state: bool,
    loss_fn: Any = None,
    logits_fn: Any = None,
    sampled_loss_fn: Any = None,
    inputs: Tree = None,
    weights: Any = None,
    row_numbers: Any = None,
    axis_name: AxisName = None,
    **unused: Any,
) -> tuple[tuple[jax.Array, Tree, Tree], Tree, Tree]:
    """((loss, auxiliary output, state), gradient, h), for `value_grad_and_hessian`."""
    del unused
    check_params(OWNER, params)
    _check_loss_fn(loss_fn, sampled_loss_fn)
    check_axes = functools.partial(check_named, OWNER, params=params, axis_name=axis_name)
    model = Model(
        settings.likelihood, logits_fn, check_axes, settings.variance, has_state, loss_fn, has_aux
    )
    call = _call(settings, key, params, Rows(inputs, weights, row_numbers), axis_name)
    manual = axis_name or manual_axes()
    evaluate = _separate_passes if settings.idle_slots and not manual else _shared_pass
    true, aux, state, h = evaluate(settings, call, model)
    loss, weight, gradient = across(jax.lax.psum, true, axis_name)

    def mean(g, p):
        return (g / weight.astype(g.dtype)).astype(p.dtype)

    beside = (aux, mean_over_shards(state, axis_name))
    return (loss / weight, *beside), jax.tree.map(mean, gradient, params), h


def _call(
    settings: Settings, key: jax.Array, params: Tree, batch: Rows, axis_name: AxisName
) -> Call:
    """Cuts the sampled rows from the batch and marks params as varying."""
    rows = sampled_rows(batch, settings.groups, settings.batch_fraction)
    return Call(key, varying(params, axis_name), batch, rows, axis_name)


def _shared_pass(settings: Settings, call: Call, model: Model) -> Evaluation:
    """One forward pass over the sampled rows gives both gradients; the remaining rows follow."""
    sampled = _evaluate_groups(settings, call, logits_pass(model))
    if settings.stride == 1:
        return sampled
    rest = remaining_rows(call.batch, settings.stride)
    remaining, (aux, state) = _gradient_of_batch(settings, call, model, rest)
    return Evaluation(
        mean_of_parts(sampled.loss_and_gradient, remaining, settings.groups, settings.stride),
        join_rows(sampled.aux, aux, len(call.sampled.numbers)),
        mean_of_two_states(sampled.state, state, settings.stride),
        sampled.h,
    )


def _separate_passes(settings: Settings, call: Call, model: Model) -> Evaluation:
    """The gradient of all rows first, then a sample.

    For rounds with idle slots: the remaining rows of a shared pass may not divide into slots.
    """
    forward = logits_pass(model._replace(loss_fn=None))
    check_stride(batch_size(call.batch[:2]), settings.stride)
    true, (aux, state) = _gradient_of_batch(settings, call, model, call.batch)
    return Evaluation(true, aux, state, _evaluate_groups(settings, call, forward).h)


def _gradient_of_batch(
    settings: Settings, call: Call, model: Model, rows: Rows
) -> tuple[LossAndGradient, tuple[Tree, Tree]]:
    """(loss and gradient, (auxiliary output, state)) of these rows, without sampling."""
    if settings.spmd_axis_name is not None and not (call.axis_name or manual_axes()):
        parallel = settings.parallel_groups, settings.spmd_axis_name
        model = model._replace(logits_fn=in_parallel_groups(model.logits_fn, *parallel))
    true, (aux, state) = gradient_pass(model)(call.params, rows)
    _check_aux(settings, aux, rows)
    return true, (aux, state)


def _evaluate_groups(
    settings: Settings, call: Call, forward: Callable[[Tree, Rows], Pass]
) -> Evaluation:
    """Evaluates all groups; loss and gradient are sums over the groups."""
    key, rows, axis_name = call.key, call.sampled, call.axis_name
    if axis_name:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    # jax.vmap cannot spread groups over explicit axes, nor sum over groups inside manual axes.
    alone = axis_name or manual_axes() or explicit_mesh(rows)
    parallel = 1 if alone else settings.parallel_groups
    group_axis = GROUP_AXIS if parallel > 1 else None
    call = call._replace(key=key)
    group = functools.partial(_evaluate_group, settings, call, forward, group_axis)
    if parallel > 1:
        spmd = settings.spmd_axis_name
        group = jax.vmap(group, out_axes=(None, 0), axis_name=group_axis, spmd_axis_name=spmd)
    sums, (aux, state) = sum_over_groups(group, rows, settings.groups, parallel, axis_name)
    true, squared = sums
    squares, count = across(jax.lax.psum, squared, axis_name)
    h = jax.tree.map(lambda s: s / count.astype(s.dtype), squares)
    return Evaluation(true, aux, state, h)


def _evaluate_group(
    settings: Settings,
    call: Call,
    forward: Callable[[Tree, Rows], Pass],
    group_axis: str | None,
    rows: Rows,
    counts: jax.Array | None,
) -> tuple[tuple[LossAndGradient | None, tuple[Tree, jax.Array]], tuple[Tree, Tree]]:
    """((loss and gradient, (squares, B)), (auxiliary output, state)) of one group.

    Sums run over the groups of a round; a group in an idle slot (`counts` is False) adds 0.
    """
    result = forward(call.params, rows)
    _check_aux(settings, result.aux, rows)

    def add_up(tree):
        return across(jax.lax.psum, zero_unless(counts, tree), group_axis)

    def square(key):
        s, count = result.sample_gradient(key)
        return add_up((jax.tree.map(lambda s: jnp.square(widen(s)), s), count))

    squared = mean_over_samples(square, call.key, settings.num_samples, call.axis_name)
    return (add_up(result.loss_and_gradient), squared), (result.aux, result.state)


def _check_aux(settings: Settings, aux: Tree, rows: Rows) -> None:
    """Rejects auxiliary output that cannot be joined row by row, if it must be joined."""
    if settings.groups > 1 or settings.stride > 1:
        number = batch_size((rows.inputs, rows.weights))
        check_aux_rows(aux, number, settings.groups, settings.batch_fraction)


def _check_loss_fn(loss_fn: Any, sampled_loss_fn: Any) -> None:
    if sampled_loss_fn is not None:
        raise ValueError(
            "a `sampled_loss_fn` makes a forward pass of its own, which cannot be shared. Call "
            "`jax.value_and_grad` and let `update` take the sample, or pass `logits_fn` instead."
        )
    checks.given(
        "value_grad_and_hessian with gauss_newton_bartlett",
        "loss_fn",
        loss_fn,
        "Pass `loss_fn=lambda outputs, inputs: ...`, the true loss of each output of `logits_fn` "
        "(without `inputs`: `lambda outputs: ...`).",
    )
