"""The mesh of devices, and how arrays are sharded over it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import models

ROWS = ("data", "fsdp")
"""The axes over which rows of a batch are sharded; activations follow their rows."""
AXES = (*ROWS, "tensor")
"""Parameters and optimizer state are sharded over the last two: "fsdp" along the model's width,
"tensor" along heads, hidden units and vocabulary. An axis for experts would come before "tensor",
and shard rows outside the experts. An axis for sequences would shard the second axis of
activations, with ring attention, and would come between "fsdp" and "tensor"."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged."""

    data: int = 0
    """Replicas of the parameters; 0 uses all devices that fsdp and tensor leave."""
    fsdp: int = 1
    """Devices over which parameters, gradients and optimizer state are sharded, to be gathered
    layer by layer; each has rows of its own."""
    tensor: int = 1
    """Devices that share the rows and divide each matrix: heads, hidden units, vocabulary. Costs
    four reductions of activations a layer, so keep it within a machine."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices, or of those given, with the axes `AXES` of type Auto.

    Raises:
      ValueError: the product of the axes is not the number of devices (`jax.make_mesh` would
        leave the surplus idle).
    """
    devices = jax.devices() if devices is None else devices
    count, rest = len(devices), config.fsdp * config.tensor
    data = config.data or count // max(rest, 1)
    if min(config.fsdp, config.tensor) < 1 or config.data < 0 or data * rest != count:
        raise ValueError(
            f"a mesh of data={config.data or 'the rest'} x fsdp={config.fsdp} x tensor="
            f"{config.tensor} does not use {count} devices exactly. Choose factors of {count}, "
            "such as --mesh.fsdp 1 --mesh.tensor 1; --mesh.data 0 takes what they leave."
        )
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def row_devices(mesh: Mesh) -> int:
    """Number of shards into which the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows sharded over `ROWS`, replicated over the other axes."""
    return NamedSharding(mesh, P(ROWS))


def constrain_activations(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Keeps activations sharded by rows; XLA alone would gather them to save a weight gather."""
    return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(ROWS)))


def constrain_group(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Keeps the activations of a group of rows on the devices of that group.

    For groups in parallel under a vmap over the mesh (`gauss_newton_bartlett(spmd_axis_name=)`).
    """
    return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))


def over_rows(mesh: Mesh, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Evaluates `function(shared, rows)` on the devices that hold the rows.

    The gradient of `shared` from a loop inside is then summed over the devices once, after the
    loop; XLA alone would sum it in each round. If the devices do not divide the rows, as in a
    small set with a probe of its own, the function is left to XLA.
    """
    devices = row_devices(mesh)
    spread = jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P(ROWS)), out_specs=P(ROWS), axis_names=set(ROWS)
    )

    def by_row(shared: Any, rows: Any) -> Any:
        number = len(jax.tree.leaves(rows)[0])
        return function(shared, rows) if devices == 1 or number % devices else spread(shared, rows)

    return by_row


def gather_embedding(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function of params: the token embeddings are gathered over "fsdp" before it.

    XLA alone would look up rows in each shard and move activations (all-to-all) instead. The
    vocabulary stays sharded over "tensor": each device looks up its own rows, and the results are
    summed.
    """

    def gathered(params, *args, **kwargs):
        table = params["tokens"]["embedding"]
        table = jax.lax.with_sharding_constraint(table, NamedSharding(mesh, P("tensor", None)))
        return function(params | {"tokens": {"embedding": table}}, *args, **kwargs)

    return gathered


def split_model(
    config: models.DecoderConfig | models.EncoderConfig, mesh: Mesh
) -> models.Functional:
    """The functions of a model, each with the token embeddings gathered over "fsdp"."""
    model = models.split(config)
    names = ("apply", "features", "logits", "unembedding")
    return model._replace(**{name: gather_embedding(mesh, getattr(model, name)) for name in names})


def abstract(shapes: Any, shardings: Any) -> Any:
    """A `ShapeDtypeStruct` with its sharding, for each leaf of a tree."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def parameter_shardings(mesh: Mesh, specs: Any) -> Any:
    """A `NamedSharding` for each `PartitionSpec`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )


def state_shardings(mesh: Mesh, init: Callable[[Any], Any], params: Any, shardings: Any) -> Any:
    """Shardings of an optimizer's state; each leaf is sharded like the parameter it is made from.

    `jax.jit(init)` would replicate the state. On a mesh with explicit axes shardings are part of
    the types, so tracing `init` there tells the sharding of each leaf.

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
