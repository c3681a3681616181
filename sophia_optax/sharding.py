"""Mesh axes: manual ones, which the caller names, and explicit ones, which JAX tracks in types."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Tree = Any
AxisName = str | tuple[str, ...] | None

# ---------------------------------------------------------------- manual axes: shard_map and pmap


def varies_over(x: Any) -> frozenset[Any]:
    """Manual axes over which an array, or its shape, differs between shards."""
    kind: Any = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    # JAX versions spell this in three ways.
    if getattr(kind, "vma", None) is not None:
        return kind.vma
    kind = getattr(kind, "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def manual_axes() -> tuple[Any, ...]:
    """Axes of the `shard_map` or `pmap` that is being traced."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def varying(tree: Tree, axis_name: AxisName) -> Tree:
    """Marks a tree as differing between shards; otherwise `grad` in `shard_map` sums over them."""
    if not axis_name:
        return tree
    zero = 0 * jax.lax.axis_index(axis_name)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def varying_like(x: jax.Array, like: Tree) -> jax.Array:
    """Marks `x` as differing over the manual axes over which some leaf of `like` differs."""
    axes = frozenset().union(*map(varies_over, jax.tree.leaves(like))) - varies_over(x)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def sum_over(
    function: Callable[[Any], tuple[Tree, Tree]], xs: Any, axis_name: AxisName = None
) -> tuple[Tree, Tree]:
    """Applies `function` to each row of `xs` in turn: (sum of first results, all second results).

    The running sum starts with the sharding of what is added to it, as `jax.lax.scan` requires.
    """
    shapes, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], xs))
    zeros = varying(jax.tree.map(_zeros_like, shapes), axis_name)

    def add(total, x):
        part, kept = function(x)
        return optax.tree.add(total, part), kept

    return jax.lax.scan(add, zeros, xs)


def _zeros_like(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros with the sharding of `shape`, on explicit and on manual axes."""
    return varying_like(jnp.zeros(shape.shape, shape.dtype, out_sharding=shape.sharding), shape)


def across(collective: Callable, tree: Tree, axis_name: AxisName) -> Tree:
    """Applies a collective, such as `psum` or `pmean`, if there are named axes."""
    return collective(tree, axis_name) if axis_name else tree


def mean_over_shards(tree: Tree, axis_name: AxisName) -> Tree:
    """The mean over named axes of floating-point leaves, and the maximum of integer leaves."""
    if not axis_name:
        return tree

    def mean(x):
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        if not inexact and not jnp.issubdtype(x.dtype, jnp.integer):
            return x
        x = varying(x, axis_name) if not varies_over(x) else x
        return (jax.lax.pmean if inexact else jax.lax.pmax)(x, axis_name)

    return jax.tree.map(mean, tree)


def check_named(owner: str, of_batch: Any, params: Tree, axis_name: AxisName) -> None:
    """Rejects manual axes that split the batch but are not named.

    Args:
      owner: name of the estimator, for the message.
      of_batch: the loss or the outputs, traced on `params` or by `jax.eval_shape`.
      params: the parameters as the caller passed them.
      axis_name: the axes that the caller named; `()` says that each shard is a separate run.

    Raises:
      ValueError: `of_batch` differs over an axis that is not named, or JAX does not track this and
        no axis is named; parameters differ over a named axis; separate runs share a parameter.
    """
    manual = manual_axes()
    if not manual:
        return
    split = set().union(*map(varies_over, jax.tree.leaves(of_batch)))
    if axis_name == ():
        _check_own_runs(owner, split, params)
        return
    named = {axis_name} if isinstance(axis_name, str) else set(axis_name or ())
    missing = split - named
    untracked = axis_name is None and not any(varies_over(jax.lax.axis_index(a)) for a in manual)
    if missing or untracked:
        axes = sorted(missing) or list(manual)
        name = repr(axes[0] if len(axes) == 1 else tuple(axes))
        cause = "differs over" if missing else "may differ over (JAX does not track it here)"
        raise ValueError(
            f"{owner}: the objective {cause} the manual axis {name} of `jax.shard_map` or "
            "`jax.pmap`, which `axis_name` does not name. Curvature would be that of one shard, or "
            f"a sum over shards. Pass `axis_name={name}` to the optimizer if each shard has its "
            "own rows of the batch, or `axis_name=()` if each shard is a run of its own."
        )
    if mixed := named & set().union(*map(varies_over, jax.tree.leaves(params))):
        raise ValueError(
            f"{owner}: `params` differ over the axis {sorted(mixed)} that `axis_name` names, so an "
            "average over it would mix parameters. Pass `update` parameters that are the same on "
            "all shards, or take the sample outside `jax.shard_map` and pass it as "
            "`hessian=`."
        )


def _check_own_runs(owner: str, split: set[Any], params: Tree) -> None:
    """Rejects parameters that the shards share: JAX would sum their gradient over the shards."""
    shared = set().union(*[split - varies_over(x) for x in jax.tree.leaves(params)])
    if shared:
        axes = tuple(sorted(shared))
        raise ValueError(
            f"{owner}: `axis_name=()` says that each shard is a run of its own, but some of "
            f"`params` are the same over {axes}, so JAX would sum their gradient and curvature "
            "over the shards. Mark them first, before `init` and the gradient: "
            f"`jax.lax.pcast(params, {axes}, to='varying')`."
        )


# ---------------------------------------------------------------- explicit axes: jax.set_mesh


def explicit_mesh(tree: Tree) -> Any:
    """The mesh of the first leaf that lies on a mesh with explicit axes, or None."""
    for x in jax.tree.leaves(tree):
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


class Spec(tuple[Any, ...]):
    """Mesh axes of the leading axes of an array; its own type, because a tuple is a pytree."""


def spec_of(x: Any) -> Spec:
    """The explicit mesh axes of each axis of an array, as JAX tracks them."""
    return Spec(jax.typeof(x).sharding.spec)


def parts_of(x: Any, axis: int) -> int:
    """The number of parts into which explicit mesh axes split an axis."""
    return devices_of(jax.typeof(x).sharding.mesh, spec_of(x)[axis])


def devices_of(mesh: Any, names: Any) -> int:
    """The number of devices along one mesh axis, or several; 1 for None."""
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[name] for name in names if name is not None)


def fitting(spec: tuple[Any, ...], shape: tuple[int, ...], mesh: Any) -> NamedSharding:
    """The sharding of `spec`, without mesh axes that do not divide their axis of the shape."""
    spec = (*spec, *[None] * (len(shape) - len(spec)))
    fits = [
        None if n % devices_of(mesh, names) else names for names, n in zip(spec, shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*fits))


def with_auto_axes(function: Callable[..., Tree], *args: Tree, specs: Tree) -> Tree:
    """`function(*args)`, with explicit mesh axes turned into Auto axes inside it.

    The library's own slices, reshapes and products need this: on explicit axes JAX would ask for
    the sharding of each. Never call a function of the user in it, which may name explicit axes.

    Args:
      function: a function of trees of arrays.
      *args: its arguments.
      specs: the sharding of the result, a tree prefix of `Spec`. Mesh axes that do not divide
        their array axis are dropped.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return function(*args)
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), args)
    shapes = jax.eval_shape(function, *bare)

    def place(spec, part):
        return jax.tree.map(lambda s: fitting(spec, s.shape, mesh), part)

    sharding = jax.tree.map(place, specs, shapes, is_leaf=lambda x: isinstance(x, Spec))
    return jax.sharding.auto_axes(function, out_sharding=sharding)(*args)
