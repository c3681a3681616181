"""How `scale_by_blocks` cuts a leaf into blocks: tiles of its matrices, or single numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from sophia_optax.numerics import accumulation_dtype
from sophia_optax.sharding import devices_of, varying_like
from sophia_optax.transforms.inverse_root import (
    frobenius_norm,
    identity_like,
    matmul,
    normalised_root,
)

ArrayLike = jax.typing.ArrayLike
Mask = Any | Callable[[optax.Params], Any] | None


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """A leaf of which each number is a block of its own."""

    b = 1

    def zeros(self, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x, dtype=accumulation_dtype(x))

    def identity(self, C: jax.Array) -> jax.Array:
        return jnp.ones([], C.dtype)

    def sample(self, g: jax.Array, mean: bool) -> jax.Array:
        del mean
        return g * g

    def finite(self, S: jax.Array) -> jax.Array:
        return jnp.isfinite(S)

    def norm(self, C: jax.Array) -> jax.Array:
        return C

    def relative(self, eps: ArrayLike, norm: jax.Array) -> jax.Array:
        del eps
        return jnp.zeros_like(norm)  # m / sqrt(v): a relative ridge would only rescale it

    def root(self, C: jax.Array, norm: jax.Array, ridge: jax.Array) -> jax.Array:
        del norm, ridge
        return self.identity(C)

    def apply(self, R: jax.Array, m: jax.Array, rms: ArrayLike | None) -> jax.Array:
        del rms
        return R * m


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Matrices [..., n, m], perhaps transposed, as padded tiles [..., R, S, b, c]."""

    shape: tuple[int, ...]  # of the leaf, before it is transposed
    transposed: bool
    b: int
    c: int

    def cut(self, x: jax.Array) -> jax.Array:
        x = x.swapaxes(-1, -2) if self.transposed else x
        *batch, n, m = x.shape
        rows, columns = -(-n // self.b), -(-m // self.c)
        edges = [(0, rows * self.b - n), (0, columns * self.c - m)]
        x = jnp.pad(x, [(0, 0)] * len(batch) + edges)
        return x.reshape(*batch, rows, self.b, columns, self.c).swapaxes(-3, -2)

    def join(self, tiles: jax.Array) -> jax.Array:
        *batch, rows, columns, b, c = tiles.shape
        x = tiles.swapaxes(-3, -2).reshape(*batch, rows * b, columns * c)
        x = x.swapaxes(-1, -2) if self.transposed else x
        return x[..., : self.shape[-2], : self.shape[-1]]

    def zeros(self, x: jax.Array) -> jax.Array:
        """The first C; blocks are sharded like the rows they are made of, or else like columns."""
        tiles = jax.eval_shape(self.cut, jax.ShapeDtypeStruct(x.shape, x.dtype)).shape
        shape, dtype, sharding = (*tiles[:-1], self.b), accumulation_dtype(x), _sharding(x)
        if sharding is None:
            return varying_like(jnp.zeros(shape, dtype), x)
        *batch, row, column = (*sharding.spec, *[None] * (jnp.ndim(x) - len(sharding.spec)))
        row, column = (column, row) if self.transposed else (row, column)
        R, S = tiles[-4:-2]
        places = (_fitting(row, R, sharding), _fitting(column, S, sharding))
        if places == (None, None):
            places = (_fitting(column, R, sharding), None)
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*batch, *places))
        return jnp.zeros(shape, dtype, device=sharding)

    def identity(self, C: jax.Array) -> jax.Array:
        return identity_like(C)

    def sample(self, g: jax.Array, mean: bool) -> jax.Array:
        tiles = self.cut(g)
        S = matmul(tiles, tiles.swapaxes(-1, -2))
        return S / self.c if mean else S

    def finite(self, S: jax.Array) -> jax.Array:
        return jnp.isfinite(S).all((-2, -1), keepdims=True)

    def norm(self, C: jax.Array) -> jax.Array:
        return frobenius_norm(C)

    def relative(self, eps: ArrayLike, norm: jax.Array) -> jax.Array:
        return jnp.asarray(eps, norm.dtype) * norm

    def root(self, C: jax.Array, norm: jax.Array, ridge: jax.Array) -> jax.Array:
        return normalised_root(C, ridge, norm + ridge)

    def apply(self, R: jax.Array, m: jax.Array, rms: ArrayLike | None) -> jax.Array:
        out = self.join(matmul(R, self.cut(m)))
        if rms is None:
            return out
        square = jnp.mean(jnp.square(out), axis=(-2, -1), keepdims=True)
        tiny = jnp.finfo(out.dtype).tiny
        return out * (jnp.asarray(rms, out.dtype) * jax.lax.rsqrt(jnp.maximum(square, tiny)))


def _sharding(x: jax.Array) -> NamedSharding | None:
    """The sharding of an array; that of a traced one is known only on explicit mesh axes."""
    concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    sharding = x.sharding if concrete else jax.typeof(x).sharding
    return sharding if isinstance(sharding, NamedSharding) and any(sharding.spec) else None


def _fitting(axes: Any, blocks: int, sharding: NamedSharding) -> Any:
    """The mesh axes if the blocks divide evenly over them, else None."""
    return None if blocks % devices_of(sharding.mesh, axes) else axes


def _is_box(x: Any) -> bool:
    """Whether this is a node around a single array, such as Flax's boxes that name mesh axes."""
    if x is None or isinstance(x, dict | list | tuple) or jax.tree_util.all_leaves([x]):
        return False
    children = jax.tree.leaves(x, is_leaf=lambda y: y is not x)
    return len(children) == 1 and jax.tree_util.all_leaves(children)


def unboxed(tree: Any, leaves: list[Any]) -> Any:
    """`tree` with other leaves; a leaf of another shape than the old one loses its box.

    A box names the mesh axes of an array of its own shape, so it would misplace any other.
    """
    structure = jax.tree.structure(tree)
    boxes, outside = jax.tree.flatten(tree, is_leaf=_is_box)
    inside = jax.tree.leaves(structure.unflatten(leaves), is_leaf=_is_box)

    def without_box(box, new):
        (old,), (leaf,) = jax.tree.leaves(box), jax.tree.leaves(new)
        return new if jnp.shape(old) == jnp.shape(leaf) else leaf

    return outside.unflatten(map(without_box, boxes, inside))


def cuts_of(block_mask: Mask, tree: optax.Params, rows: bool, block_size: int) -> Any:
    """A tree that says how each leaf is cut, by `Tiles` or `Elementwise`."""

    def cut(path, x, is_matrix):
        if not is_matrix:
            return Elementwise()
        if jnp.ndim(x) < 2:
            raise ValueError(
                f"`block_mask` selects {jax.tree_util.keystr(path) or 'params'} of shape "
                f"{jnp.shape(x)}, which is not a matrix; select leaves of two axes or more."
            )
        n, m = x.shape[-2:]
        if rows:
            return Tiles(x.shape, n > m, max(min(block_size, n, m), 1), max(n, m, 1))
        return Tiles(x.shape, False, max(min(block_size, n), 1), max(min(block_size, m), 1))

    if block_mask is None:
        mask = jax.tree.map(lambda x: jnp.ndim(x) >= 2, tree)
    elif not jax.tree.leaves(tree):  # empty, or the placeholder of `optax.tree.map_params`
        return tree
    else:
        mask = jax.tree.broadcast(block_mask(tree) if callable(block_mask) else block_mask, tree)
    return jax.tree.map_with_path(cut, tree, mask)
