"""From a config to compiled programs: shapes, then shardings, then arrays."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train import data, inputs
from train.config.schema import Config, resolved
from train.optimizers.base import BuiltOptimizer, Due
from train.parallel import fit, mesh
from train.step import heldout, loss
from train.step import train_step as step_lib
from train.step.batch import Batch


class Program(NamedTuple):
    """Compiled functions and shapes of a run; nothing is allocated yet."""

    init: Any  # () -> TrainState, each shard made in place
    step: Any  # (state, batch, due: static) -> (state, metrics); state is donated
    compile: Any  # due -> the compiled step of that kind, (state, batch) -> (state, metrics)
    evaluate: Any  # params, as of `heldout.make_evaluate` -> dict of floats, or None
    data: Callable[[], data.Data]  # read at the first call, with its errors
    batch: Any  # step number -> Batch on the mesh
    abstract: step_lib.TrainState  # ShapeDtypeStruct with sharding, for each leaf of the state
    optimizer: BuiltOptimizer


def assemble(config: Config, devices: Sequence[Any] | None = None) -> Program:
    """The programs of a run.

    Args:
      config: of the run.
      devices: that it runs on; default all.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch or the model does not fit the
        mesh.
    """
    placed = mesh.make_mesh(config.mesh, devices)
    config = resolved(config, placed.devices.flat[0].platform)
    fit.check_batch(config.batch_size, config.accumulation, placed)
    fit.check_model(config.model, placed)
    model = mesh.split_model(config.model, placed)
    optimizer = config.optim.build(config.context(mesh.row_devices(placed)))
    init = functools.partial(step_lib.init_state, model.init, optimizer.tx, config.seed)
    abstract = _abstract(init, optimizer.tx, placed, model.specs)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    shapes = inputs.batch_shapes(config, placed)
    loaded = inputs.loader(config, config.batch_size)
    outputs = loss.outputs_of(model, config.loss_chunk)
    whole_text = config.data.task == "next-token"
    step = jax.jit(
        _step(config, outputs, optimizer, placed),
        static_argnames="due",
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=step,
        compile=functools.partial(compile_step, step, abstract, shapes),
        evaluate=heldout.on_mesh(outputs, placed, loaded, whole_text=whole_text),
        data=loaded,
        batch=lambda number: data.to_mesh(functools.partial(loaded().batch, number), shapes),
        abstract=abstract,
        optimizer=optimizer,
    )


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs between runs: a restart takes seconds."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def compile_step(step, state: step_lib.TrainState, batch: Batch, due: Due, options=None) -> Any:
    """The compiled step of one kind, from shapes alone."""
    return step.lower(state, batch, due=due).compile(compiler_options=options)


def _abstract(init, tx: optax.GradientTransformation, placed: Mesh, specs) -> step_lib.TrainState:
    shapes = jax.eval_shape(init)
    params = mesh.parameter_shardings(placed, specs)
    opt_state = mesh.state_shardings(placed, tx.init, shapes.params, params)
    shardings = shapes._replace(step=NamedSharding(placed, P()), params=params, opt_state=opt_state)
    return mesh.abstract(shapes, shardings)


def _step(config: Config, outputs: loss.Outputs, optimizer: BuiltOptimizer, placed: Mesh):
    sampling = optimizer.sampling
    # cuDNN attention has no second derivative.
    twice_differentiable = dataclasses.replace(config.model, attention="xla")
    in_parallel = sampling is not None and sampling.parallel_groups > 1
    return step_lib.make_step(
        outputs,
        optimizer.tx,
        sampling=sampling,
        seed=config.seed,
        hessian_outputs=loss.outputs_of(
            mesh.split_model(twice_differentiable, placed), config.loss_chunk
        ),
        constrain=mesh.constrain_activations(placed),
        constrain_group=mesh.constrain_group(placed) if in_parallel else None,
        over_rows=functools.partial(mesh.over_rows, placed),
        accumulation=config.accumulation,
    )
