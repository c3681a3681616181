"""One training step: loss, gradient, update. No input or output, no schedule of its own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sophia_optax
from models.decoder import Constrain, identity
from sophia_optax.curvature import sum_over
from sophia_optax.shared import value_grad_and_hessian
from train import guard

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
    constrain_group: Constrain | None = None,
    accumulation: int = 1,
    sample_every: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The step of any optimizer; those that sample curvature find what they need.

    Args:
      apply: the model.
      tx: the optimizer.
      estimator: what curvature is sampled with, if `tx` uses any: it is evaluated with the
        gradient (`value_grad_and_hessian`), and `tx` is given the sample.
      seed: of the samples; from a batch in one piece `tx` would draw the same with its own.
      hessian_apply: the model with attention that can be differentiated twice; default `apply`.
      constrain: sharding of activations.
      constrain_group: the same inside a group of rows, where the estimator spreads groups over the
        devices under vmap; default `constrain`.
      accumulation: K, micro-batches that are evaluated one after the other. Each has every K-th
        row, so that a shard of the batch is cut and never moved.
      sample_every: n, a divisor of K: curvature is sampled from every n-th micro-batch, each with
        a key of its own, and the samples are averaged. So other labels and probes are drawn than
        from a batch in one piece.

    Returns:
      `(state, batch, refresh) -> (state, metrics)` with batch int32[B, T + 1] and refresh a
      Python bool, static under jit: one program for plain steps, one for those that also sample
      curvature; None leaves it to `tx`, and means every step if an `estimator` is passed. Metrics
      are float32 scalars.
    """
    tx = optax.with_extra_args_support(tx)
    hessian_apply = hessian_apply or apply

    def logits_fn(params, batch):
        return apply(params, batch[:, :-1], constrain=constrain_group or constrain)

    def obj_fn(params, batch):
        return mean_loss(hessian_apply, params, batch, constrain=constrain)

    def loss_fn(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])

    model = {"obj_fn": obj_fn, "logits_fn": logits_fn}

    def gradient(params, batch):
        loss = functools.partial(mean_loss, apply, batch=batch, constrain=constrain)
        return jax.value_and_grad(loss)(params)

    both = None
    if estimator:
        shared = functools.partial(value_grad_and_hessian(estimator), loss_fn=loss_fn, **model)
        both = functools.partial(_sums_and_sample, gradient, shared, sample_every)

    def step(state: TrainState, batch: jax.Array, refresh: bool):
        batches = micro_batches(batch, accumulation)
        if both and refresh is not False:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            sums, hessian = both(key, state.params, batches)
        else:
            sums, hessian = _sum(gradient, state.params, batches), None
        loss, grads = optax.tree.scale(1 / accumulation, sums)
        norm = optax.tree.norm(grads)

        def update(old, grads):
            updates, opt_state = tx.update(
                grads,
                old[1],
                old[0],
                hessian=hessian,
                refresh=refresh,
                value=loss,
                inputs=batch,
                **model,
            )
            return optax.apply_updates(old[0], updates), opt_state

        old = (state.params, state.opt_state)
        (params, opt_state), skipped = guard.if_finite(update, old, grads, loss, norm)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped}
        metrics |= sophia_optax.diagnostics(opt_state)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def micro_batches(batch: jax.Array, number: int) -> jax.Array:
    """[B, ...] to [K, B / K, ...]: micro-batch i has the rows i, i + K, i + 2 K, ..."""
    return jnp.swapaxes(batch.reshape(-1, number, *batch.shape[1:]), 0, 1)


def _sums_and_sample(gradient, shared, every: int, key, params, batches_KxBxT):
    """((sum of losses, of gradients), mean of the samples of every n-th micro-batch)."""
    cut = batches_KxBxT.reshape(-1, every, *batches_KxBxT.shape[1:])
    keys = jax.random.split(key, len(cut)) if len(cut) > 1 else key[None]

    def sample(params, key, batch):
        return shared(key, params, inputs=batch)

    loss, grads, h = _sum(sample, params, keys, cut[:, 0])
    if every > 1:
        others = cut[:, 1:].reshape(-1, *batches_KxBxT.shape[1:])
        loss, grads = optax.tree.add((loss, grads), _sum(gradient, params, others))
    return (loss, grads), optax.tree.scale(1 / len(cut), h)


def _sum(function: Callable[..., Any], params: Any, *xs: jax.Array) -> Any:
    """The sum of `function(params, *x)` over the rows of `xs`, one after the other."""
    if len(xs[0]) == 1:
        return function(params, *(x[0] for x in xs))

    def part(x):
        # Else XLA gathers parameters before the loop, and keeps the whole model on each device.
        params_here, x = jax.lax.optimization_barrier((params, x))
        return function(params_here, *x), None

    return sum_over(part, xs)[0]
