"""From a config to compiled programs: shapes, then shardings, then arrays."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import models
from train import data, evaluate, mesh
from train import step as step_lib
from train.config import Config
from train.optimizers import SophiaGeometric
from train.sophia import SophiaG, SophiaH


class Program(NamedTuple):
    """What a config is turned into before anything is allocated."""

    apply: step_lib.Apply
    init: Any  # () -> TrainState, each shard made in place
    step: Any  # (state, batch, refresh: static bool or None) -> (state, metrics); state is donated
    compile: Any  # refresh -> the compiled step of that kind, (state, batch) -> (state, metrics)
    evaluate: Any  # params -> dict of floats
    batch: Any  # step number -> int32[B, T + 1] on the mesh
    abstract: step_lib.TrainState  # ShapeDtypeStruct with sharding, for each leaf of the state


def assemble(run: Config, devices: Sequence[Any] | None = None) -> Program:
    """The programs of a run, on all devices there are or on those given.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch or the width not the mesh.
    """
    placed = mesh.make_mesh(run.mesh, devices)
    parts = placed.size * run.accumulation
    if run.batch_size % parts:
        cut = f" in {run.accumulation} micro-batches" * (run.accumulation > 1)
        raise ValueError(
            f"batch_size={run.batch_size} does not divide over {placed.size} devices{cut}; choose "
            f"a multiple of {parts}."
        )
    if run.model.width % run.mesh.fsdp:
        raise ValueError(
            f"--mesh.fsdp {run.mesh.fsdp} does not divide the model's width of {run.model.width}, "
            "along which parameters are sharded; choose a factor of it."
        )
    model = _split(run.model, placed)
    tx = _optimizer(run)
    init = functools.partial(step_lib.init_state, model.init, tx, run.seed)
    abstract = _abstract(init, tx, placed, model.specs)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    batch, heldout = _batches(run, mesh.batch_sharding(placed))
    step = jax.jit(
        _step(run, model, tx, placed),
        static_argnames="refresh",
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    return Program(
        apply=model.apply,
        init=jax.jit(init, out_shardings=shardings),
        step=step,
        compile=functools.partial(_compile, step, abstract, _abstract_batch(run, placed)),
        evaluate=evaluate.make_evaluate(
            model.apply,
            heldout,
            mesh.batch_sharding(placed),
            constrain=mesh.constrain_activations(placed),
        ),
        batch=batch,
        abstract=abstract,
    )


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs between runs: a restart takes seconds."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def _optimizer(run: Config) -> optax.GradientTransformation:
    optimizer = run.optim.make(
        run.schedule,
        seed=run.seed,
        total_steps=run.steps,
        batch_size=run.batch_size,
        accumulation=run.accumulation,
        max_norm=run.gradient_clip or None,
    )
    if not run.gradient_clip or isinstance(run.optim, SophiaGeometric):  # which clips by itself
        return optimizer
    return optax.chain(optax.clip_by_global_norm(run.gradient_clip), optimizer)


def _abstract(init, tx: optax.GradientTransformation, placed: Mesh, specs) -> step_lib.TrainState:
    shapes = jax.eval_shape(init)
    params = mesh.parameter_shardings(placed, specs)
    opt_state = mesh.state_shardings(placed, tx.init, shapes.params, params)
    shardings = shapes._replace(step=NamedSharding(placed, P()), params=params, opt_state=opt_state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _abstract_batch(run: Config, placed: Mesh) -> jax.ShapeDtypeStruct:
    shape = (run.batch_size, run.sequence_length + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=mesh.batch_sharding(placed))


def _compile(step, state: step_lib.TrainState, batch: jax.ShapeDtypeStruct, refresh: bool | None):
    return step.lower(state, batch, refresh=refresh).compile()


def _split(config: models.DecoderConfig, placed: Mesh) -> models.Functional:
    model = models.split(config)
    return model._replace(apply=mesh.gather_embedding(placed, model.apply))


def _step(run: Config, model: models.Functional, tx: optax.GradientTransformation, placed: Mesh):
    # cuDNN attention has no second derivative.
    twice_differentiable = dataclasses.replace(run.model, attention="xla")
    sampling = {}
    if isinstance(run.optim, SophiaG | SophiaH):
        cut = run.batch_size, run.accumulation
        shards = run.optim.shards(placed.size, *cut)
        sampling["estimator"] = run.optim.estimator(shards, *cut)
        sampling["sample_every"] = run.optim.strides(*cut)[0]
        if shards > 1:
            sampling["constrain_group"] = mesh.constrain_group(placed)
    return step_lib.make_step(
        model.apply,
        tx,
        seed=run.seed,
        hessian_apply=_split(twice_differentiable, placed).apply,
        constrain=mesh.constrain_activations(placed),
        accumulation=run.accumulation,
        **sampling,
    )


def _batches(run: Config, sharding: NamedSharding):
    """(step number -> batch on the mesh, () -> iterator of the held-out batches)."""
    tokens = data.shakespeare()
    sizes = {"batch_size": run.batch_size, "sequence_length": run.sequence_length}

    def batch(step: int) -> jax.Array:
        rows = functools.partial(data.batch, tokens.train, **sizes, seed=run.seed, step=step)
        shape = (run.batch_size, run.sequence_length + 1)
        return data.to_mesh(lambda chosen: rows(rows=chosen), shape, sharding)

    return batch, functools.partial(data.heldout_batches, tokens.heldout, **sizes)
