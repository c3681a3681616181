"""One training step: loss, gradient, curvature sample, update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sophia_optax
from models.decoder import Constrain, identity
from sophia_optax.estimators.rows import split_interleaved
from sophia_optax.estimators.value_and_grad import value_grad_and_hessian
from sophia_optax.sharding import sum_over
from train.optimizers.base import Due, SamplingPlan
from train.step import skip_nonfinite
from train.step.batch import Batch
from train.step.loss import Outputs, OverRows, mean_loss, normalized, token_losses


class TrainState(NamedTuple):
    """The state of a run: all that a checkpoint must hold to go on."""

    step: jax.Array  # int32 (), steps done
    params: Any
    opt_state: Any


def init_state(init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, seed: int):
    """State at step 0; under jit with `out_shardings` each device makes its own shard."""
    params = init(jax.random.key(seed))
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


def make_step(
    outputs: Outputs,
    tx: optax.GradientTransformation,
    *,
    sampling: SamplingPlan | None = None,
    seed: int = 0,
    hessian_outputs: Outputs | None = None,
    constrain: Constrain = identity,
    constrain_group: Constrain | None = None,
    over_rows: OverRows | None = None,
    accumulation: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The training step of any optimizer.

    Args:
      outputs: the model as a function of batches: `train.step.loss.outputs_of`.
      tx: the optimizer, with gradient clipping.
      sampling: how curvature is sampled; the sample shares the forward pass of the gradient
        (`value_grad_and_hessian`) and is passed to `tx`. None samples nothing.
      seed: of the samples.
      hessian_outputs: the model for Hessian-vector products, with attention that is twice
        differentiable; default `outputs`.
      constrain: sharding of activations.
      constrain_group: the same inside a group of rows, if the estimator maps groups over the
        devices with vmap; default `constrain`.
      over_rows: evaluates a chunked loss where its rows are: `parallel.mesh.over_rows`.
      accumulation: K, micro-batches that are evaluated one after the other. Micro-batch i has the
        rows i, i + K, ..., so that a shard of the batch is cut and never moved, and counts by its
        weights: loss, gradient and sample are those of the whole batch.

    Returns:
      `(state, batch, due) -> (state, metrics)` with a `Batch`, and a `Due` that is static under
      jit: one program for plain steps, one for those that sample curvature as well. `tx.update`
      is passed `value`, `hessian`, `refresh` and `renew`. Metrics are float32 scalars.
    """
    tx = optax.with_extra_args_support(tx)
    loss_of = _loss_of(outputs, constrain, over_rows)
    gradient, sample = functools.partial(_gradient, loss_of), None
    if sampling:
        shared = functools.partial(
            value_grad_and_hessian(sampling.estimator),
            loss_fn=token_losses,
            obj_fn=_loss_of(hessian_outputs or outputs, constrain, over_rows),
            logits_fn=lambda params, batch: outputs(params, batch, constrain_group or constrain),
        )
        sample = functools.partial(_sums_and_sample, gradient, shared, sampling.microbatch_stride)

    def step(state: TrainState, batch: Batch, due: Due = Due()):  # noqa: B008
        parts = _parts(normalized(batch), accumulation)
        if sample and due.refresh is not False:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            (loss, grads), hessian = sample(key, state.params, parts)
        else:
            (loss, grads), hessian = _sum(gradient, state.params, parts), None
        norm = optax.tree.norm(grads)
        extra = {"value": loss, "hessian": hessian} | due._asdict()
        update = functools.partial(_update, tx, **extra)
        old = (state.params, state.opt_state)
        (params, opt_state), skipped = skip_nonfinite.if_finite(update, old, grads, loss, norm)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped}
        metrics |= sophia_optax.diagnostics(opt_state)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def _loss_of(outputs: Outputs, constrain: Constrain, over_rows: OverRows | None):
    """Mean loss as a function of (params, batch)."""

    def loss_of(params: Any, batch: Batch) -> jax.Array:
        return mean_loss(outputs(params, batch, constrain), batch, over_rows)

    return loss_of


def _gradient(loss_of: Callable[..., jax.Array], params, share, numbers, batch: Batch) -> Any:
    """A micro-batch's (loss, gradient), as its contribution to those of the batch."""
    del numbers
    return _part(share, jax.value_and_grad(loss_of)(params, batch))


def _update(tx: optax.GradientTransformationExtraArgs, old: Any, grads: Any, **extra: Any) -> Any:
    """(parameters, optimizer state) after a step."""
    params, opt_state = old
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    return optax.apply_updates(params, updates), opt_state


class _Parts(NamedTuple):
    """Micro-batches; leaves lead with their number K."""

    share: jax.Array  # float32[K], of the weight of the batch
    numbers: jax.Array  # int32[K, B / K], row numbers in the batch
    batch: Batch


def _parts(batch: Batch, number: int) -> _Parts:
    cut = split_interleaved(batch, number)
    rows = split_interleaved(jnp.arange(len(batch.inputs), dtype=jnp.int32), number)
    share = jnp.full(number, 1 / number, jnp.float32)
    if batch.weights is not None:
        share *= jnp.mean(cut.weights.reshape(number, -1), 1)
    return _Parts(share, rows, jax.vmap(normalized)(cut))


def _part(share: jax.Array, means: Any) -> Any:
    """A micro-batch's contribution to the means of the batch; 0 if its weights are all 0."""
    return jax.tree.map(lambda x: jnp.where(share > 0, share.astype(x.dtype) * x, 0), means)


def _sums_and_sample(gradient, shared, every: int, key, params, parts: _Parts):
    """((loss, gradient), curvature sample on every n-th micro-batch)."""

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
    """Sum of `function(params, *part)` over the micro-batches, one after the other."""
    if len(parts.share) == 1:
        return function(params, *jax.tree.map(lambda x: x[0], parts))

    def add(part):
        # Else XLA gathers parameters before the loop, and keeps the whole model on each device.
        params_here, part = jax.lax.optimization_barrier((params, part))
        return function(params_here, *part), None

    return sum_over(add, parts)[0]
