"""One training step: loss, gradient, update. No input or output, no schedule of its own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sophia_optax
from models.decoder import Constrain, identity
from sophia_optax.estimators.value_and_grad import value_grad_and_hessian
from sophia_optax.sharding import sum_over
from train.step import skip_nonfinite
from train.step.batch import Batch
from train.step.loss import Outputs, OverRows, mean_loss, normalized, token_losses


class TrainState(NamedTuple):
    """All that a run must keep to go on."""

    step: jax.Array  # int32 (), steps done
    params: Any
    opt_state: Any


def init_state(init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, seed: int):
    """State at step 0; jit it with `out_shardings` so that each shard is made in place."""
    params = init(jax.random.key(seed))
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


def make_step(
    outputs: Outputs,
    tx: optax.GradientTransformation,
    *,
    estimator: sophia_optax.Estimator | None = None,
    seed: int = 0,
    hessian_outputs: Outputs | None = None,
    constrain: Constrain = identity,
    constrain_group: Constrain | None = None,
    over_rows: OverRows | None = None,
    accumulation: int = 1,
    sample_every: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The step of any optimizer; those that sample curvature find what they need.

    Args:
      outputs: the model as a function of batches, of `train.step.loss.outputs_of`.
      tx: the optimizer.
      estimator: what curvature is sampled with, if `tx` uses any: it is evaluated with the
        gradient (`value_grad_and_hessian`), and `tx` is given the sample.
      seed: of the samples; `tx` would draw the same with its own, until a step is left out.
      hessian_outputs: the model as the Hessian is taken of it, such as with attention that can be
        differentiated twice; default `outputs`.
      constrain: sharding of activations.
      constrain_group: the same inside a group of rows, where the estimator spreads groups over the
        devices under vmap; default `constrain`.
      over_rows: how to evaluate a loss in chunks where its rows are: `parallel.mesh.over_rows`.
      accumulation: K, micro-batches that are evaluated one after the other. Each has every K-th
        row, so that a shard of the batch is cut and never moved, and counts by its weights: loss,
        gradient and sample are those of the batch in one piece.
      sample_every: n, a divisor of K: curvature is sampled from every n-th micro-batch.

    Returns:
      `(state, batch, refresh) -> (state, metrics)` with a `Batch` and refresh a Python bool,
      static under jit: one program for plain steps, one for those that also sample curvature;
      None leaves it to `tx`, and means every step if an `estimator` is passed. Metrics are
      float32 scalars.
    """
    tx = optax.with_extra_args_support(tx)
    hessian_outputs = hessian_outputs or outputs

    def logits_fn(params, batch):
        return outputs(params, batch, constrain_group or constrain)

    def obj_fn(params, batch):
        return mean_loss(hessian_outputs(params, batch, constrain), batch, over_rows)

    model = {"obj_fn": obj_fn, "logits_fn": logits_fn}

    def gradient(params, share, numbers, batch):
        del numbers

        def loss(params):
            return mean_loss(outputs(params, batch, constrain), batch, over_rows)

        return _part(share, jax.value_and_grad(loss)(params))

    both = None
    if estimator:
        shared = functools.partial(value_grad_and_hessian(estimator), loss_fn=token_losses, **model)
        both = functools.partial(_sums_and_sample, gradient, shared, sample_every)

    def step(state: TrainState, batch: Batch, refresh: bool):
        batch = normalized(batch)
        parts = _parts(batch, accumulation)
        if both and refresh is not False:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            (loss, grads), hessian = both(key, state.params, parts)
        else:
            (loss, grads), hessian = _sum(gradient, state.params, parts), None
        norm = optax.tree.norm(grads)
        extra = model | {"inputs": batch, "weights": batch.weights, "value": loss}
        update = functools.partial(_update, tx, hessian=hessian, refresh=refresh, **extra)
        old = (state.params, state.opt_state)
        (params, opt_state), skipped = skip_nonfinite.if_finite(update, old, grads, loss, norm)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped}
        metrics |= sophia_optax.diagnostics(opt_state)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def _update(tx: optax.GradientTransformationExtraArgs, old: Any, grads: Any, **extra: Any) -> Any:
    """(parameters, state of the optimizer) after a step."""
    params, opt_state = old
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    return optax.apply_updates(params, updates), opt_state


def micro_batches(batch: Any, number: int) -> Any:
    """Leaves [B, ...] to [K, B / K, ...]: micro-batch i has the rows i, i + K, i + 2 K, ..."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, number, *x.shape[1:]), 0, 1), batch)


class _Parts(NamedTuple):
    """Micro-batches; leaves lead with their number K."""

    share: jax.Array  # float32[K], of what counts in the batch
    numbers: jax.Array  # int32[K, B / K], of the rows in the batch
    batch: Batch


def _parts(batch: Batch, number: int) -> _Parts:
    cut = micro_batches(batch, number)
    rows = micro_batches(jnp.arange(len(batch.inputs), dtype=jnp.int32), number)
    share = jnp.full(number, 1 / number, jnp.float32)
    if batch.weights is not None:
        share *= jnp.mean(cut.weights.reshape(number, -1), 1)
    return _Parts(share, rows, jax.vmap(normalized)(cut))


def _part(share: jax.Array, means: Any) -> Any:
    """What a micro-batch adds to the means of the batch; nothing if nothing counts in it."""
    return jax.tree.map(lambda x: jnp.where(share > 0, share.astype(x.dtype) * x, 0), means)


def _sums_and_sample(gradient, shared, every: int, key, params, parts: _Parts):
    """((loss, gradient), sample of the rows of every n-th micro-batch)."""

    def sample(params, share, numbers, batch):
        means = shared(key, params, inputs=batch, weights=batch.weights, row_numbers=numbers)
        return _part(share, means)

    cut = jax.tree.map(lambda x: x.reshape(-1, every, *x.shape[1:]), parts)
    chosen = jax.tree.map(lambda x: x[:, 0], cut)
    loss, grads, h = _sum(sample, params, chosen)
    if every > 1:
        others = jax.tree.map(lambda x: x[:, 1:].reshape(-1, *x.shape[2:]), cut)
        loss, grads = optax.tree.add((loss, grads), _sum(gradient, params, others))
    return (loss, grads), optax.tree.scale(1 / jnp.sum(chosen.share), h)


def _sum(function: Callable[..., Any], params: Any, parts: _Parts) -> Any:
    """The sum of `function(params, *part)` over the parts, one after the other."""
    if len(parts.share) == 1:
        return function(params, *jax.tree.map(lambda x: x[0], parts))

    def add(part):
        # Else XLA gathers parameters before the loop, and keeps the whole model on each device.
        params_here, part = jax.lax.optimization_barrier((params, part))
        return function(params_here, *part), None

    return sum_over(add, parts)[0]
