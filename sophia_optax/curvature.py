"""Estimators: one sample of the diagonal of the curvature.

An estimator is a pure function `(key, params, updates, **extra) -> h`; h is shaped as params,
float32 at least, in units of loss / parameter². `hessian_estimate` decides when to take samples
and how to average them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks

Tree = Any
AxisName = str | tuple[str, ...] | None


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
class SharingEstimator:
    """An estimator that can also give the loss and its gradient: see `value_grad_and_hessian`."""

    sample: Estimator
    with_gradient: Callable[..., tuple[tuple[jax.Array, Tree], Tree, Tree]]
    """`(key, params, *, has_aux, **extra) -> ((loss, aux), gradient, h)`."""

    def __call__(
        self, key: jax.Array, params: optax.Params | None, updates: optax.Updates, **extra: Any
    ) -> optax.Updates:
        return self.sample(key, params, updates, **extra)


def accumulation_dtype(x: jax.typing.ArrayLike) -> jnp.dtype:
    """float32 at least, float64 where `x` is."""
    with jax.numpy_dtype_promotion("standard"):  # else bfloat16 has no answer in strict mode
        return jnp.promote_types(jnp.result_type(x), jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    return x.astype(accumulation_dtype(x))


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
    zeros = varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), axis_name)

    def add(total, x):
        part, kept = function(x)
        return optax.tree.add(total, part), kept

    return jax.lax.scan(add, zeros, xs)


def batch_size(inputs: Tree) -> int:
    """The number of rows, the same in every leaf."""
    leaves = jax.tree.leaves(inputs)
    sizes = {jnp.shape(x)[0] for x in leaves if jnp.ndim(x)}
    if len(sizes) != 1 or not all(map(jnp.ndim, leaves)):
        raise ValueError(
            "every leaf of `inputs` (and `weights`) must lead with the same batch axis, but the "
            f"shapes are {[jnp.shape(x) for x in leaves]}."
        )
    return sizes.pop()


def every_nth_row(tree: Tree, fraction: float) -> Tree:
    """Every (1/fraction)-th row, so that each shard of the batch keeps its share.

    A slice `x[:n]` would move rows between devices.
    """
    stride = round(1 / fraction)
    return jax.tree.map(lambda x: x[::stride], tree) if stride > 1 else tree


def hutchinson(
    *,
    probe: str = "rademacher",
    num_samples: int = 1,
    batch_fraction: float = 1.0,
    mode: str = "forward",
) -> Estimator:
    r"""Hutchinson's estimator of the diagonal of the Hessian: h = u ⊙ (H u).

    Unbiased for diag H. The variance of a coordinate is Σ_{j≠i} H_ij² with Rademacher probes;
    normal probes add 2 H_ii².

    Args:
      probe: "rademacher" (default) or "normal", the paper's.
      num_samples: independent probes averaged in one sample; each costs a Hessian-vector product,
        after one evaluation of the gradient.
      batch_fraction: share of the rows of `inputs` that the Hessian is taken of: every n-th row,
        n = round(1 / fraction).
      mode: "forward" (jvp of the gradient) or "reverse" (vjp of the gradient), for losses with
        nested `custom_vjp`, on which jax refuses the former ("can't apply forward-mode autodiff").

    Extra arguments of `update`:
      obj_fn: `params -> scalar`, the mean loss of this step's batch and nothing else;
        `(params, inputs) -> scalar` when `inputs` is passed.
      inputs: pytree whose leaves lead with the batch axis; needed if `batch_fraction` < 1.

    Returns:
      An estimator, which `value_grad_and_hessian` takes: it shares work if `batch_fraction` is 1.
      Under `axis_name` all shards use one probe, and H u is averaged over them: `obj_fn` is then
      the mean loss of a shard's own rows, free of collectives.

    Raises:
      ValueError: an argument is out of range; `obj_fn` or `params` is missing; params are masked.
      TypeError: `obj_fn` returns more than a scalar.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 1, with Rademacher instead of normal
    probes because their variance is never larger.

    >>> import jax, jax.numpy as jnp
    >>> f = lambda x: x[0] ** 2 + 3 * x[1] ** 2       # diag H = (2, 6), no off-diagonal terms
    >>> x = jnp.ones(2)
    >>> print(hutchinson()(jax.random.key(0), x, None, obj_fn=f))
    [2. 6.]
    """
    _checks.one_of("probe", probe, ("rademacher", "normal"))
    _checks.one_of("mode", mode, ("forward", "reverse"))
    _checks.positive_integer("num_samples", num_samples)
    check_fraction(batch_fraction)
    sampler = jax.random.rademacher if probe == "rademacher" else jax.random.normal

    def differentiate(gradient, key, params, axis_name):
        """(gradient, (loss, aux), h)."""
        here = varying(params, axis_name)

        def draw(key):
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

    def estimator(key, params, updates, *, obj_fn=None, inputs=None, axis_name=None, **unused):
        del updates, unused
        gradient = _gradient(obj_fn, params, inputs, batch_fraction)
        return differentiate(gradient, key, params, axis_name)[2]

    def with_gradient(key, params, *, has_aux, obj_fn=None, inputs=None, axis_name=None, **unused):
        del unused
        sampled = _gradient(obj_fn, params, inputs, batch_fraction, has_aux)
        grads, (loss, aux), h = differentiate(sampled, key, params, axis_name)
        if (
            round(1 / batch_fraction) > 1
        ):  # means of parts do not combine: `obj_fn` may weigh its rows
            whole = _gradient(obj_fn, params, inputs, 1, has_aux)
            grads, (loss, aux) = whole(varying(params, axis_name))
        loss, grads = across(jax.lax.pmean, (loss, grads), axis_name)
        return (loss, aux), grads, h

    return SharingEstimator(estimator, with_gradient)


def _linearize(mode: str, gradient: Callable, params: Tree) -> tuple[Tree, Callable, Any]:
    """(gradient, u -> H u, what the gradient has beside itself)."""
    if mode == "forward":
        return jax.linearize(gradient, params, has_aux=True)
    grads, pullback, beside = jax.vjp(gradient, params, has_aux=True)
    return grads, lambda u: pullback(u)[0], beside  # H is symmetric


def _gradient(
    obj_fn: Any, params: Tree, inputs: Tree, fraction: float, has_aux: bool = False
) -> Callable[[Tree], tuple[Tree, tuple[jax.Array, Tree]]]:
    """`params -> (gradient, (loss, aux))` on a share of the rows."""
    _checks.given(
        "hutchinson",
        "obj_fn",
        obj_fn,
        "Pass `obj_fn=lambda params: loss(params, batch)`, or a sample as `hessian=`.",
    )
    check_params("hutchinson", params)
    objective = _bind_inputs(obj_fn, inputs, fraction)
    _check_scalar(objective, params, has_aux)

    def gradient(params):
        value, grads = jax.value_and_grad(objective, has_aux=has_aux)(params)
        return grads, value if has_aux else (value, None)

    return gradient


def check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"batch_fraction={fraction} is outside (0, 1].")
    if abs(fraction * round(1 / fraction) - 1) > 1e-2:
        raise ValueError(
            f"batch_fraction={fraction} is not one n-th (1, 1/2, 1/3, ...): each n-th row is taken."
        )


def check_params(owner: str, params: optax.Params) -> None:
    _checks.given(owner, "params", params, "Call `tx.update(grads, state, params, ...)`.")
    _checks.unmasked(owner, params)


def _check_scalar(objective: Callable[[Tree], Any], params: optax.Params, has_aux: bool) -> None:
    loss = out = jax.eval_shape(objective, params)
    if has_aux:
        loss = out[0] if isinstance(out, tuple) and len(out) == 2 else None
    if isinstance(loss, jax.ShapeDtypeStruct) and loss.shape == ():
        return
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


def across(collective: Callable, tree: Tree, axis_name: AxisName) -> Tree:
    """A `psum` or `pmean` inside `shard_map`, nothing outside."""
    return tree if axis_name is None else collective(tree, axis_name)


def varying(tree: Tree, axis_name: AxisName) -> Tree:
    """Marks a tree as differing over shards: else `grad` inside `shard_map` sums over them."""
    if axis_name is None:
        return tree
    zero = 0 * jax.lax.axis_index(axis_name)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)
