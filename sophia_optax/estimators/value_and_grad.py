"""Loss, gradient and a sample of curvature, of one forward pass."""

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

    For steps on which curvature is due, in place of `jax.value_and_grad`. All three come of one
    forward pass: with `gauss_newton_bartlett` the gradients of the true loss and of the sampled
    one are two pullbacks of each group's outputs; with `hutchinson` loss and gradient are what
    H u is the derivative of. ĥ is what `estimator(key, θ, None, **extra)` returns, up to rounding.

    Loss and gradient are always those of the whole batch. Where the estimator takes 1/n of it,
    Gauss-Newton-Bartlett shares the forward pass of those rows, and the other rows get an ordinary
    pass: about 1 + 2/(3n) gradients instead of 1 + 1/n. Hutchinson evaluates its rows apart, since
    the mean that `obj_fn` returns may weigh them.

    Micro-batches of gradient accumulation may be shared: call this on those that curvature is
    sampled from, all with one key and each with the `row_numbers` of its rows, and
    `jax.value_and_grad` on the others. The mean of the samples is a sample of all their rows,
    exactly where B is the same in each.

    In units of one `jax.value_and_grad`, such a step of a small GPT-2 takes 1.68 times the
    floating-point operations with Gauss-Newton-Bartlett instead of 2.02, and 3.02 with Hutchinson
    instead of 3.71, on the whole batch. Of separate calls in one program XLA merges what is equal
    by itself: all of the forward pass with one group (1.68), some of it with Hutchinson (3.24),
    but nothing with groups or several draws, or where parameters are sharded.

    Args:
      estimator: of `hutchinson` or `gauss_newton_bartlett`.
      has_aux: the loss returns auxiliary output too, `(loss, aux)`; with groups or a sub-batch of
        `gauss_newton_bartlett` its leaves lead with the rows of the outputs at hand, and come back
        with those of the batch.
      has_state: `logits_fn` of `gauss_newton_bartlett` returns `(outputs, state)`, such as running
        averages of batch normalisation. Of several groups or shards the mean of real numbers comes
        back, which is right for averages that start from one state, and of anything else one of
        them. With `hutchinson` the state is the auxiliary output.

    Returns:
      A function `(key, params, **extra) -> (loss, gradient, h)`, with `(loss, aux)`, `(loss,
      state)` or `(loss, aux, state)` in the place of the loss where the arguments say so.
      The gradient has the dtypes of params. To use it, `tx.update(gradient, state, params,
      hessian=h)`. The key that `hessian_estimate(seed=s)` uses at its update n = 0, 1, ... is
      `jax.random.fold_in(jax.random.key(s), n)`. Of `extra` each estimator reads its own, and
      ignores the others:
        obj_fn, inputs, row_numbers: as in `hutchinson`, whose loss this is.
        loss_fn: for `gauss_newton_bartlett`, the true loss of each output, unaveraged:
          `outputs -> float[B, ...]`, or `(outputs, inputs)` when `inputs` is passed; shaped as
          `weights` where there are some. The loss is Σ w l / Σ w, not finite if Σ w = 0.
          Of `LinearLogits`, `softmax_cross_entropy`.
        logits_fn, inputs, weights, row_numbers: as in `gauss_newton_bartlett`.
        axis_name: axis of an enclosing `shard_map`; loss and gradient are then those of all
          shards (Hutchinson: the mean of the shards' losses), auxiliary output is the shard's.

    Raises:
      TypeError: the estimator shares no forward pass; `obj_fn` returns another form.
      ValueError: what the estimator raises; `loss_fn` is missing or returns another form;
        `sampled_loss_fn` is passed; the n of Gauss-Newton-Bartlett does not divide the rows.

    Source: Liu et al. 2023 (arXiv 2305.14342) evaluate the two apart; the sharing is ours.

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
            f"{estimator} shares no forward pass: only hutchinson(...) and "
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
