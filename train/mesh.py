"""Devices in a mesh, and who holds which part of what."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
"""The batch is sharded over both axes, parameters and optimizer state over the second."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged."""

    data: int = 0
    """Devices that hold copies of the parameters; 0 takes all that fsdp leaves."""
    fsdp: int = 1
    """Devices over which parameters, gradients and optimizer state are sharded."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices, or of those given, with axes "data" and "fsdp" of type Auto.

    Raises:
      ValueError: the product of the axes is not the number of devices (`jax.make_mesh` would
        leave the surplus idle).
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    data = config.data or count // max(config.fsdp, 1)
    if config.fsdp < 1 or config.data < 0 or data * config.fsdp != count:
        raise ValueError(
            f"a mesh of data={config.data or 'the rest'} x fsdp={config.fsdp} does not use "
            f"{count} devices exactly. Choose factors of {count}: --mesh.data 0 takes what "
            "--mesh.fsdp leaves."
        )
    shape = (data, config.fsdp)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, P(AXES))


def constrain_activations(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Keeps activations sharded by rows; left alone, XLA gathers them to save a weight gather."""
    return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(AXES)))


def constrain_group(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Keeps the activations of a group of rows where these are: on one device.

    For groups side by side under a vmap over the mesh (`gauss_newton_bartlett(spmd_axis_name=)`).
    """
    return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))


def gather_embedding(mesh: Mesh, apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A model's `apply` that gathers the embedding before it reads rows of it.

    XLA would look up rows of what each device holds, and move activations (all-to-all) instead.
    """

    def gathered(params, *args, **kwargs):
        table = params["tokens"]["embedding"]
        table = jax.lax.with_sharding_constraint(table, NamedSharding(mesh, P()))
        return apply(params | {"tokens": {"embedding": table}}, *args, **kwargs)

    return gathered


def parameter_shardings(mesh: Mesh, specs: Any) -> Any:
    """A `NamedSharding` for each `PartitionSpec`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )


def state_shardings(mesh: Mesh, init: Callable[[Any], Any], params: Any, shardings: Any) -> Any:
    """Shardings of an optimizer's state, each leaf like the parameter it is made of.

    `jax.jit(init)` would replicate it. On a mesh of explicit axes shardings are part of types,
    so tracing `init` there tells where each leaf belongs.

    Args:
      mesh: the mesh of automatic axes that the run uses.
      init: a transformation's `init`.
      params: `ShapeDtypeStruct` of each parameter.
      shardings: its `NamedSharding`.

    Returns:
      A `NamedSharding` for each leaf of the state.
    """
    twin = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(AXES))

    def explicit(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(twin, sharding.spec))

    with jax.set_mesh(twin):
        state = jax.eval_shape(init, jax.tree.map(explicit, params, shardings))
    return jax.tree.map(
        lambda x: NamedSharding(mesh, x.sharding.spec if x.sharding else P()), state
    )
