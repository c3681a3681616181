"""One Hutchinson sample: products of the Hessian with random probes, averaged over groups."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sophia_optax import checks
from sophia_optax.estimators.base import (
    check_params,
    mean_over_samples,
)
from sophia_optax.estimators.rows import (
    batch_size,
    check_groups,
    every_nth_row,
    numbers_of,
    split_interleaved,
)
from sophia_optax.numerics import widen
from sophia_optax.sharding import AxisName, Tree, across, check_named, sum_over, varying

OWNER = "hutchinson"
Probe = str | Callable[[jax.Array, Tree], Tree]


class Settings(NamedTuple):
    """Arguments of `hutchinson`."""

    probe: Probe
    num_samples: int
    groups: int
    batch_fraction: float
    mode: str


class Call(NamedTuple):
    """Extra arguments of one call."""

    obj_fn: Any
    inputs: Tree
    row_numbers: Any
    axis_name: AxisName
    has_aux: bool = False


def sample(
    settings: Settings,
    key: jax.Array,
    params: Tree,
    updates: Any,
    *,
    obj_fn: Any = None,
    inputs: Tree = None,
    row_numbers: Any = None,
    axis_name: AxisName = None,
    **unused: Any,
) -> Tree:
    """One sample of h."""
    del updates, unused
    return _evaluate(settings, key, params, Call(obj_fn, inputs, row_numbers, axis_name))[1]


def sample_with_gradient(
    settings: Settings,
    key: jax.Array,
    params: Tree,
    *,
    has_aux: bool,
    has_state: bool,
    obj_fn: Any = None,
    inputs: Tree = None,
    row_numbers: Any = None,
    axis_name: AxisName = None,
    **unused: Any,
) -> tuple[tuple[jax.Array, Tree, None], Tree, Tree]:
    """((loss, auxiliary output, None), gradient, h), for `value_grad_and_hessian`."""
    del unused
    if has_state:
        raise TypeError(
            "has_state=True works with gauss_newton_bartlett only, whose `logits_fn` has no other "
            "way to return a state. With hutchinson, return the new state as the auxiliary output "
            "of `obj_fn`: has_aux=True."
        )
    call = Call(obj_fn, inputs, row_numbers, axis_name, has_aux)
    whole, h = _evaluate(settings, key, params, call)
    if whole is None or round(1 / settings.batch_fraction) > 1:
        # Means over parts cannot be combined: `obj_fn` may weigh its rows.
        whole = _gradient_of(call, params)(varying(params, axis_name))
    grads, (loss, aux) = whole
    loss, grads = across(jax.lax.pmean, (loss, grads), axis_name)
    return (loss, aux, None), grads, h


def _evaluate(
    settings: Settings, key: jax.Array, params: Tree, call: Call
) -> tuple[tuple[Tree, tuple[jax.Array, Tree]] | None, Tree]:
    """((gradient, (loss, aux)) of the sampled rows, h); the first is None with several groups."""
    params = jax.tree.map(jnp.asarray, params)  # a parameter may be a Python number
    if settings.groups > 1:
        return None, _mean_over_groups(settings, key, params, call)
    gradient = _gradient_of(call, params, settings.batch_fraction)
    if call.row_numbers is not None:
        key = _key_of_rows(key, jnp.asarray(call.row_numbers), call.axis_name)
    grads, value, h = _differentiate(settings, gradient, key, params, call.axis_name)
    return (grads, value), h


def _mean_over_groups(settings: Settings, key: jax.Array, params: Tree, call: Call) -> Tree:
    """The mean of h over groups of interleaved rows, one after the other."""

    def of_group(x):
        rows, numbers = x
        gradient = _gradient_of(call._replace(inputs=rows), params)
        here = _key_of_rows(key, numbers, call.axis_name)
        return _differentiate(settings, gradient, here, params, call.axis_name)[2], None

    total, _ = sum_over(of_group, _interleaved_groups(settings, call))
    return optax.tree.scale(1 / settings.groups, total)


def _interleaved_groups(settings: Settings, call: Call) -> tuple[Tree, jax.Array]:
    """(inputs, row numbers) of the sampled rows, [groups, rows / groups, ...]."""
    if call.inputs is None:
        raise ValueError(
            f"hutchinson(groups={settings.groups}) cuts rows from `inputs`, which was not passed. "
            "Pass `inputs=batch` and `obj_fn=lambda params, inputs: ...`."
        )
    number = batch_size(call.inputs)
    batch = call.inputs, numbers_of(call.row_numbers, number)
    rows = every_nth_row(batch, settings.batch_fraction)
    check_groups(len(rows[1]), number, settings.batch_fraction, settings.groups)
    return split_interleaved(rows, settings.groups)


def _key_of_rows(key: jax.Array, numbers: jax.Array, axis_name: AxisName) -> jax.Array:
    """The key of a group, from its smallest row number over all shards: they share one probe."""
    number = across(jax.lax.pmin, varying(numbers.min(), axis_name), axis_name)
    return jnp.where(number > 0, jax.random.fold_in(key, number), key)


# ---------------------------------------------------------------- products with the Hessian


def _differentiate(
    settings: Settings, gradient: Callable, key: jax.Array, params: Tree, axis_name: AxisName
) -> tuple[Tree, Any, Tree]:
    """(gradient, (loss, aux), h)."""
    here = varying(params, axis_name)
    if settings.mode == "forward" and settings.num_samples == 1:
        u = _draw_probe(settings.probe, key, params)
        # jvp stores no residuals; linearize would.
        grads, hu, value = jax.jvp(gradient, (here,), (varying(u, axis_name),), has_aux=True)
        return grads, value, _times(u, hu, axis_name)
    grads, product, value = _linearize(settings.mode, gradient, here)

    def sample(key):
        u = _draw_probe(settings.probe, key, params)
        return _times(u, product(varying(u, axis_name)), axis_name)

    return grads, value, mean_over_samples(sample, key, settings.num_samples)


def _draw_probe(probe: Probe, key: jax.Array, params: Tree) -> Tree:
    """The random vector u, shaped as params."""
    if callable(probe):
        return probe(key, params)
    sampler = jax.random.rademacher if probe == "rademacher" else jax.random.normal
    return optax.tree.random_like(key, params, sampler)


def _times(u: Tree, hu: Tree, axis_name: AxisName) -> Tree:
    """The product u ⊙ (H u), with H u averaged over the shards."""
    hu = across(jax.lax.pmean, hu, axis_name)
    return jax.tree.map(lambda u, hu: widen(u) * widen(hu), u, hu)


def _linearize(mode: str, gradient: Callable, params: Tree) -> tuple[Tree, Callable, Any]:
    """(gradient, u -> H u, auxiliary output of the gradient)."""
    if mode == "forward":
        return jax.linearize(gradient, params, has_aux=True)
    grads, pullback, aux = jax.vjp(gradient, params, has_aux=True)
    return grads, lambda u: pullback(u)[0], aux  # H is symmetric


# ---------------------------------------------------------------- the objective


def _gradient_of(
    call: Call, params: Tree, fraction: float = 1
) -> Callable[[Tree], tuple[Tree, tuple[jax.Array, Tree]]]:
    """`params -> (gradient, (loss, aux))` on a fraction of the rows."""
    obj_fn = checks.given(
        OWNER,
        "obj_fn",
        call.obj_fn,
        "Pass `obj_fn=lambda params: loss(params, batch)`, or a sample as `hessian=`.",
    )
    check_params(OWNER, params)
    objective = _bind_inputs(obj_fn, call.inputs, fraction)
    loss = _check_scalar(objective, params, call.has_aux)
    check_named(OWNER, loss, params, call.axis_name)

    def gradient(params):
        value, grads = jax.value_and_grad(objective, has_aux=call.has_aux)(params)
        return grads, value if call.has_aux else (value, None)

    return gradient


def _bind_inputs(function: Callable, inputs: Tree, fraction: float) -> Callable[[Tree], Any]:
    """`function` of params alone, on a fraction of the rows of `inputs`."""
    if inputs is not None:
        batch_size(inputs)
        return lambda params: function(params, every_nth_row(inputs, fraction))
    if fraction != 1:
        raise ValueError(
            f"hutchinson(batch_fraction={fraction}) cuts rows from `inputs`, which was not "
            "passed. Pass `inputs=batch` and `obj_fn=lambda params, inputs: ...`."
        )
    return function


def _check_scalar(objective: Callable[[Tree], Any], params: optax.Params, has_aux: bool) -> Any:
    """The shape and type of the loss, which must be one scalar."""
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
