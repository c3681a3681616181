"""Loss, gradient and a curvature sample from one forward pass."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sophia_optax.estimators.base import Estimator, Sampler


def value_grad_and_hessian(
    estimator: Estimator, *, has_aux: bool = False, has_state: bool = False
) -> Callable[..., tuple[Any, optax.Updates, optax.Updates]]:
    r"""Makes a function that returns the loss, its gradient and a sample of curvature.

        (key, θ) -> (L(θ), ∇L(θ), ĥ)

    Call it in place of `jax.value_and_grad` on steps that sample curvature. All three results come
    from one forward pass. With `gauss_newton_bartlett`, the gradients of the true and of the
    sampled loss are two pullbacks of the outputs of each group. With `hutchinson`, H u is the
    derivative of the gradient that is returned. ĥ equals `estimator(key, θ, None, **extra)`, up to
    rounding.

    Loss and gradient always cover the whole batch. If the estimator samples 1/n of the rows,
    `gauss_newton_bartlett` shares the forward pass of these rows and makes an ordinary pass over
    the others: about 1 + 2/(3n) gradients instead of 1 + 1/n. `hutchinson` evaluates the sampled
    rows separately, since `obj_fn` may weigh them.

    With gradient accumulation, call it on the micro-batches that are sampled, all with one key and
    each with the `row_numbers` of its rows, and `jax.value_and_grad` on the others. The mean of the
    samples is a sample of all these rows, exactly so if B is the same in each micro-batch.

    In units of one `jax.value_and_grad`, a step of a small GPT-2 that samples the whole batch takes
    1.68 times the floating-point operations with `gauss_newton_bartlett` (2.02 with separate
    calls), and 3.02 with `hutchinson` (3.71). If the separate calls are in one program, XLA merges
    equal operations itself: the whole forward pass with one group (1.68), a part of it with
    `hutchinson` (3.24), but nothing with several groups or draws, or with sharded parameters.

    Args:
      estimator: made by `hutchinson` or `gauss_newton_bartlett`.
      has_aux: whether the loss returns `(loss, aux)`, with auxiliary output. If
        `gauss_newton_bartlett` has groups or samples a fraction of the rows, the leaves of `aux`
        must lead with the rows of the outputs; they come back with all rows of the batch.
      has_state: whether `logits_fn` of `gauss_newton_bartlett` returns `(outputs, state)`, such as
        running averages of batch normalisation. With several groups or shards, floating-point
        leaves come back as their mean, which is right for averages that start from one state, and
        other leaves from one of them. With `hutchinson`, use the auxiliary output for the state.

    Returns:
      A function `(key, params, **extra) -> (loss, gradient, h)`. In place of the loss it returns
      `(loss, aux)`, `(loss, state)` or `(loss, aux, state)`, as `has_aux` and `has_state`
      say. The gradient has the dtypes of params. Pass the sample on with
      `tx.update(gradient, state, params, hessian=h)`. The key that `hessian_estimate(seed=s)` uses
      at its update n = 0, 1, ... is `jax.random.fold_in(jax.random.key(s), n)`. Each estimator
      reads its own arguments from `extra`, and ignores the others:
        obj_fn, inputs, row_numbers: as in `hutchinson`; `obj_fn` gives the loss.
        loss_fn: for `gauss_newton_bartlett`, the true loss of each output, not averaged:
          `outputs -> float[B, ...]`, or `(outputs, inputs)` if `inputs` is passed, shaped as
          `weights` if there are any. The loss is Σ w l / Σ w, which is not finite if Σ w = 0. For
          `LinearLogits`, use `softmax_cross_entropy`.
        logits_fn, inputs, weights, row_numbers: as in `gauss_newton_bartlett`.
        axis_name: axis of an enclosing `shard_map`. Loss and gradient then cover all
          shards (with `hutchinson` the mean of the shards' losses); `aux` is the shard's own.

    Raises:
      TypeError: the estimator cannot share a forward pass; `obj_fn` returns another form.
      ValueError: the estimator raises it; `loss_fn` is missing or returns another form;
        `sampled_loss_fn` is passed; `gauss_newton_bartlett` samples every n-th row, and n does not
        divide the rows.

    Source: Liu et al. 2023 (arXiv 2305.14342) evaluate gradient and sample separately; sharing a
    pass is ours.

    >>> import jax, jax.numpy as jnp, optax
    >>> from sophia_optax import gauss_newton_bartlett, sophia_g
    >>> batch = {"x": jnp.eye(4), "y": jnp.arange(4)}
    >>> params, tx = jnp.zeros((4, 4)), sophia_g(.1)
    >>> loss, grads, h = value_grad_and_hessian(gauss_newton_bartlett(groups=4))(
    ...     jax.random.fold_in(jax.random.key(0), 0), params, inputs=batch,
    ...     logits_fn=lambda params, batch: batch["x"] @ params,
    ...     loss_fn=lambda logits, batch:
    ...         optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))
    >>> updates, state = tx.update(grads, tx.init(params), params, hessian=h)
    >>> print(loss.round(3), updates[0].round(1))
    1.386 [ 0.1 -0.1 -0.1 -0.1]
    """
    if not isinstance(estimator, Sampler) or estimator.with_gradient is None:
        raise TypeError(
            f"{estimator} shares no forward pass with the loss: only hutchinson(...) and "
            "gauss_newton_bartlett(...) do. Call `jax.value_and_grad`, and let `update` call the "
            "estimator."
        )

    with_gradient = estimator.with_gradient

    def function(key: jax.Array, params: optax.Params, **extra: Any):
        (loss, aux, state), gradient, h = with_gradient(
            key, params, has_aux=has_aux, has_state=has_state, **extra
        )
        beside = (aux,) * has_aux + (state,) * has_state
        return (loss, *beside) if beside else loss, gradient, h

    return function
