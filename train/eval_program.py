"""Held-out evaluation of existing parameters on any mesh, without an optimizer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train import data, inputs
from train.config.schema import Config, resolved
from train.parallel import mesh
from train.step import heldout, loss


class EvalProgram(NamedTuple):
    """What is needed to restore the parameters of a run and to evaluate them."""

    params: Any  # ShapeDtypeStruct with sharding, for each parameter
    step: Any  # the same, for the number of steps done
    data: Callable[[], data.Data]  # read at the first call, with its errors
    evaluate: Any  # params -> dict of floats


def build_eval(config: Config) -> EvalProgram:
    """The program for all devices, whatever mesh the run was trained on.

    Held-out batches are rounded up to a multiple of the devices.
    """
    devices = jax.device_count()
    placed = mesh.make_mesh(mesh.MeshConfig(fsdp=math.gcd(devices, config.model.width)))
    config = resolved(config, placed.devices.flat[0].platform)
    model = mesh.split_model(config.model, placed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = mesh.abstract(shapes, mesh.parameter_shardings(placed, model.specs))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(placed, P()))
    loaded = inputs.loader(config, -(-config.batch_size // devices) * devices)
    outputs = loss.outputs_of(model, config.loss_chunk)
    whole_text = config.data.task == "next-token"
    evaluate = heldout.on_mesh(outputs, placed, loaded, whole_text=whole_text)
    return EvalProgram(params, step, loaded, evaluate)
