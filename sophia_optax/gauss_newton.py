"""Gauss-Newton-Bartlett: the Gauss-Newton diagonal from labels that the model draws itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax import _checks
from sophia_optax.curvature import (
    AxisName,
    Estimator,
    Tree,
    accumulation_dtype,
    batch_size,
    check_fraction,
    check_params,
    every_nth_row,
    mean_over_samples,
    sum_over,
    varying,
    widen,
)


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
      num_samples: independent draws of all labels, averaged in one sample.
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
      An estimator. Labels are functions of (key, row), groups of rows: neither the mesh nor the
      number of groups changes which labels are drawn (a `sampled_loss_fn` gets a key for each
      group instead). Under `axis_name` each shard groups its own
      rows, and squares and B are summed over the shards. If nothing is counted (B = 0) the sample
      is not finite and `hessian_estimate` rejects it. On a mesh with explicit axes, wrap the
      call in `jax.sharding.auto_axes`.

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
    _checks.one_of("likelihood", likelihood, tuple(_SAMPLED_LOSSES))
    for name, value in (("groups", groups), ("num_samples", num_samples), ("shards", shards)):
        _checks.positive_integer(name, value)
    check_fraction(batch_fraction)
    if groups % shards:
        raise ValueError(f"groups={groups} must be a multiple of shards={shards}.")

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
        loss = _sampled_loss(likelihood, logits_fn, sampled_loss_fn, inputs, weights)
        rows = _rows(inputs, weights, groups, batch_fraction)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        params = varying(params, axis_name)

        def square(key, rows):
            s, count = jax.grad(loss, has_aux=True)(params, rows, key)
            return jax.tree.map(lambda s: jnp.square(widen(s)), s), count

        def sample(key):
            square_rows = functools.partial(square, key)
            squares, count = _sum_over_groups(square_rows, rows, groups, shards, axis_name)
            if axis_name is not None:
                squares, count = jax.lax.psum((squares, count), axis_name)
            return jax.tree.map(lambda s: s / count.astype(s.dtype), squares)

        return mean_over_samples(sample, key, num_samples)

    return estimator


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
    square: Callable[[Tree], Tree], rows: Tree, groups: int, shards: int, axis_name: AxisName
) -> Tree:
    """Side by side over shards, one after the other inside a shard.

    A scan over all groups would gather every group onto every device.
    """
    if groups == 1:
        return square(rows)
    cut = jax.tree.map(lambda x: x.reshape(shards, groups // shards, -1, *x.shape[1:]), rows)
    per_shard = jax.vmap(functools.partial(sum_over, square, axis_name=axis_name))(cut)
    return jax.tree.map(lambda s: jnp.sum(s, 0), per_shard)


def _sampled_loss(likelihood: str, logits_fn, sampled_loss_fn, inputs, weights) -> Callable:
    """`(params, (inputs, weights, rows), key) -> (summed loss on sampled labels, B)`."""
    if sampled_loss_fn is not None:
        if weights is not None:
            raise ValueError(
                "`weights` go with `logits_fn`; a `sampled_loss_fn` weighs its own outputs, each "
                "cotangent times sqrt(w). Pass them inside `inputs`."
            )

        def from_user(params, rows, key):
            inputs, _, numbers = rows
            key = key if numbers is None else jax.random.fold_in(key, numbers[0])
            loss, count = sampled_loss_fn(params, inputs, key)
            return loss, jnp.asarray(count, jnp.float32)

        return from_user
    _checks.given(
        "gauss_newton_bartlett",
        "logits_fn",
        logits_fn,
        "Pass `logits_fn=lambda params: model(params, batch)`, the outputs before the loss "
        "(or `sampled_loss_fn`).",
    )

    def from_logits(params, rows, key):
        inputs, weights, numbers = rows
        outputs = logits_fn(params) if inputs is None else logits_fn(params, inputs)
        _check_outputs(outputs, likelihood, numbers)
        outputs = widen(outputs)
        numbers = jnp.arange(outputs.shape[0]) if numbers is None else numbers
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
        losses = jax.vmap(_SAMPLED_LOSSES[likelihood])(keys, outputs)
        return _weighted_sum(losses, weights)

    return from_logits


def _check_outputs(outputs: Any, likelihood: str, numbers: jax.Array | None) -> None:
    rank = 1 if likelihood == "bernoulli" else 2
    rows = "B" if numbers is None else len(numbers)
    shapes = jax.tree.map(jnp.shape, outputs)
    if not isinstance(outputs, jax.Array) or outputs.ndim < rank or rows not in ("B", shapes[0]):
        raise ValueError(
            f"`logits_fn` must return one array, float[{rows}, ..., V] with the rows of `inputs` "
            f"first, but it returned {shapes}. Drop auxiliary outputs; keep the batch axis apart."
        )


def _weighted_sum(losses: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array]:
    """(Σ sqrt(w) l, Σ w): squaring the gradient of the first restores the weight w."""
    if weights is None:
        return jnp.sum(losses), jnp.asarray(losses.size, jnp.float32)
    if jnp.shape(weights) != losses.shape:
        raise ValueError(
            f"`weights` has shape {jnp.shape(weights)}, but the outputs that count have shape "
            f"{losses.shape} (for 'categorical' and 'gaussian' the logits' without the last axis)."
        )
    weights = jnp.asarray(weights, losses.dtype)
    return jnp.sum(jnp.sqrt(weights) * losses), jnp.sum(weights, dtype=accumulation_dtype(weights))


def _categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _bernoulli(key: jax.Array, logits: jax.Array) -> jax.Array:
    labels = jax.random.bernoulli(key, jax.nn.sigmoid(jax.lax.stop_gradient(logits)))
    return optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))


def _gaussian(key: jax.Array, outputs: jax.Array) -> jax.Array:
    labels = jax.lax.stop_gradient(outputs) + jax.random.normal(key, outputs.shape, outputs.dtype)
    return jnp.sum(optax.l2_loss(outputs, labels), axis=-1)


_SAMPLED_LOSSES = {"categorical": _categorical, "bernoulli": _bernoulli, "gaussian": _gaussian}
