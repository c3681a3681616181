"""One training step: loss, gradient, update. No input or output, no schedule of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sophia_optax
from models.decoder import Constrain, identity
from sophia_optax.curvature import SharingEstimator
from sophia_optax.shared import value_grad_and_hessian

Apply = Callable[..., jax.Array]  # (params, tokens[B, T], constrain) -> logits[B, T, V]


class TrainState(NamedTuple):
    """All that a run must keep to go on."""

    step: jax.Array  # int32 (), steps done
    params: Any
    opt_state: Any


def init_state(init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, seed: int):
    """State at step 0; jit it with `out_shardings` so that each shard is made in place."""
    params = init(jax.random.key(seed))
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


def mean_loss(apply: Apply, params: Any, batch: jax.Array, **kwargs: Any) -> jax.Array:
    """Mean cross-entropy in nats of each next token of `batch`, int32[B, T + 1]."""
    return jnp.mean(token_losses(apply, params, batch, **kwargs))


def token_losses(apply: Apply, params: Any, batch: jax.Array, **kwargs: Any) -> jax.Array:
    """Cross-entropy in nats of each next token, float32[B, T]."""
    logits = apply(params, batch[:, :-1], **kwargs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])


def make_step(
    apply: Apply,
    tx: optax.GradientTransformation,
    *,
    estimator: sophia_optax.Estimator | None = None,
    seed: int = 0,
    hessian_apply: Apply | None = None,
    constrain: Constrain = identity,
    grouped: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The step of any optimizer; those that sample curvature find what they need.

    Args:
      apply: the model.
      tx: the optimizer.
      estimator: what `tx` samples curvature with, if it does. One that can share a forward pass
        is evaluated with the gradient, and `tx` is given the sample.
      seed: of the samples, as in `tx`, which would draw the same.
      hessian_apply: the model with attention that can be differentiated twice; default `apply`.
      constrain: sharding of activations.
      grouped: curvature is sampled under vmap, where activations must not be constrained.

    Returns:
      `(state, batch, refresh) -> (state, metrics)` with batch int32[B, T + 1] and refresh a
      Python bool, static under jit: one program for plain steps, one for those that also sample
      curvature; None leaves it to `tx`, and means every step if an `estimator` is passed. Metrics
      are float32 scalars.
    """
    tx = optax.with_extra_args_support(tx)
    hessian_apply = hessian_apply or apply
    shares = isinstance(estimator, SharingEstimator)
    shared = value_grad_and_hessian(estimator) if shares else None

    def logits_fn(params, batch):
        return apply(params, batch[:, :-1], **({} if grouped else {"constrain": constrain}))

    def obj_fn(params, batch):
        return mean_loss(hessian_apply, params, batch, constrain=constrain)

    def loss_fn(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])

    def step(state: TrainState, batch: jax.Array, refresh: bool):
        model = {"obj_fn": obj_fn, "logits_fn": logits_fn, "inputs": batch}
        if shared and refresh is not False:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            loss, grads, hessian = shared(key, state.params, loss_fn=loss_fn, **model)
        else:
            hessian = None
            loss, grads = jax.value_and_grad(
                lambda params: mean_loss(apply, params, batch, constrain=constrain)
            )(state.params)
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            hessian=hessian,
            refresh=refresh,
            value=loss,
            **model,
        )
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        metrics |= sophia_optax.diagnostics(opt_state)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step
