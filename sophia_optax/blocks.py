"""Curvature in blocks along the diagonal: what stands behind `orthosoph`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from sophia_optax import _checks
from sophia_optax.holes import none_left_alone
from sophia_optax.inverse_root import (
    floored,
    frobenius_norm,
    identity_like,
    matmul,
    normalised_root,
)
from sophia_optax.numerics import accumulation_dtype, cast_to_step, widen
from sophia_optax.sharding import spec_of, varying_like, with_auto_axes
from sophia_optax.transform import refresh_due

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike
Mask = Any | Callable[[optax.Params], Any] | None

# ---------------------------------------------------------------- how a leaf is cut


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """A leaf as blocks of one number."""

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
        return jnp.zeros_like(norm)  # m / sqrt(v): every ridge would only scale it

    def root(self, C: jax.Array, norm: jax.Array, ridge: jax.Array) -> jax.Array:
        del norm, ridge
        return self.identity(C)

    def apply(self, R: jax.Array, m: jax.Array, rms: ArrayLike | None) -> jax.Array:
        del rms
        return R * m


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Matrices [..., n, m], perhaps transposed, as [..., R, S, b, c], edges filled with zeros."""

    shape: tuple[int, ...]  # of the leaf
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
        """C at first; blocks are sharded like the rows that make them, or else like the columns."""
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
    """That of an array, or of a traced one on a mesh of explicit axes."""
    concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    sharding = x.sharding if concrete else jax.typeof(x).sharding
    return sharding if isinstance(sharding, NamedSharding) and any(sharding.spec) else None


def _fitting(axes: Any, blocks: int, sharding: NamedSharding) -> Any:
    """The mesh axes, if the blocks divide over them."""
    names = axes if isinstance(axes, tuple) else (axes,)
    if axes is None or blocks % math.prod(sharding.mesh.shape[name] for name in names):
        return None
    return axes


def _is_box(x: Any) -> bool:
    """A node around a single array, such as Flax puts there to name mesh axes.

    The names fit the array's shape, and no other: blocks are kept without the box.
    """
    if x is None or isinstance(x, dict | list | tuple) or jax.tree_util.all_leaves([x]):
        return False
    children = jax.tree.leaves(x, is_leaf=lambda y: y is not x)
    return len(children) == 1 and jax.tree_util.all_leaves(children)


def _unboxed(tree: Any, leaves: list[Any]) -> Any:
    """`tree` with other leaves, those of another shape without their box."""
    structure = jax.tree.structure(tree)
    boxes, outside = jax.tree.flatten(tree, is_leaf=_is_box)
    inside = jax.tree.leaves(structure.unflatten(leaves), is_leaf=_is_box)

    def without_box(box, new):
        (old,), (leaf,) = jax.tree.leaves(box), jax.tree.leaves(new)
        return new if jnp.shape(old) == jnp.shape(leaf) else leaf

    return outside.unflatten(map(without_box, boxes, inside))


def _cuts(block_mask: Mask, tree: optax.Params, rows: bool, block_size: int) -> Any:
    """How each leaf is cut: `_Tiles` or `_Numbers`."""

    def cut(path, x, is_matrix):
        if not is_matrix:
            return _Numbers()
        if jnp.ndim(x) < 2:
            raise ValueError(
                f"`block_mask` marks {jax.tree_util.keystr(path) or 'params'} of shape "
                f"{jnp.shape(x)}, which holds no matrix; mark leaves of two axes or more."
            )
        n, m = x.shape[-2:]
        if rows:
            return _Tiles(x.shape, n > m, max(min(block_size, n, m), 1), max(n, m, 1))
        return _Tiles(x.shape, False, max(min(block_size, n), 1), max(min(block_size, m), 1))

    if block_mask is None:
        mask = jax.tree.map(lambda x: jnp.ndim(x) >= 2, tree)
    elif not jax.tree.leaves(tree):  # the placeholder of `optax.tree.map_params`, or nothing
        return tree
    else:
        mask = jax.tree.broadcast(block_mask(tree) if callable(block_mask) else block_mask, tree)
    return jax.tree.map_with_path(cut, tree, mask)


# ---------------------------------------------------------------- the transformation


class ScaleByBlocksState(NamedTuple):
    """State of `scale_by_blocks`; a matrix has R x S blocks of b x b.

    >>> import jax.numpy as jnp
    >>> state = scale_by_blocks(b2=.9, block_size=2).init(jnp.zeros((4, 6)))
    >>> print(state.mu.dtype, state.curvature.shape)
    bfloat16 (2, 1, 2, 2)
    """

    count: jax.Array  # int32 (), updates seen  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates  # `mu_dtype`, shaped as params: the uncorrected momentum
    # What has another shape than its parameter is without the box that Flax puts around that.
    curvature: Any  # float32 or 64 [..., R, S, b, b], of numbers as they; 0 where none is kept
    root: Any  # Z [..., R, S, b, b], or 1 for numbers; () where the update interval is 1


def scale_by_blocks(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.0,
    eps: ArrayLike = 1e-6,
    block_size: int = 128,
    update_interval: ArrayLike = 1,
    form: str = "rows",
    b2_numbers: ArrayLike = 0.95,
    mu_dtype: DTypeLike | None = "bfloat16",
    rms: ArrayLike | None = 0.2,
    nesterov: bool = True,
    block_mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum whitened block by block of rows, or by the curvature of tiles.

    A leaf holds matrices in its last two axes. Each is cut into blocks of b rows and c columns:

        M <- b1 M + (1 - b1) G
        C <- b2 C + (1 - b2) S                      b x b for each block
        out = (C + ridge I)^(-1/2) M

    form="rows": the shorter side of the matrix gives the rows, c is the whole longer side;
    S = M Mᵀ / c, M and C are corrected for their bias, ridge = eps ‖C‖_F. At b2 = 0 each block of
    rows becomes sqrt(c) times its polar factor; with a single block this is Muon.
    form="tiles": c = b, S = G Gᵀ, no correction, ridge = eps.
    Edges are filled with zeros. Other leaves are blocks of one number, S = g², whose decay with
    rows is b2_numbers: that is Adam, without an eps.

    Roots are taken every k updates. In between they keep their shape, and the scale is current:
    out = Z M / sqrt(s), s = ‖C‖_F + ridge, with Z = ((C + ridge I) / s)^(-1/2) of the last refresh
    (a first gradient of 0, or far smaller than the next ones, would make steps far too long).

    Args:
      b1: decay of the momentum, in [0, 1).
      b2: decay of C, in [0, 1), per update; where it is the number 0, no C is kept.
      eps: ridge, relative with rows, absolute with tiles; at least 4 b ulp ‖C‖_F.
      block_size: b; smaller where the matrix is. A static integer.
      update_interval: k >= 1, updates between roots; where it is the number 1, none is kept.
      form: "rows" or "tiles".
      b2_numbers: with rows, decay of the second moment of what is in no matrix.
      mu_dtype: dtype of M; None is the parameter's. bfloat16 rounds to nearest, as in optax, and
        stalls where (1 - b1) G is under a 256th of M.
      rms: root mean square of each matrix's output; .2 is about AdamW's, whose learning rates
        then fit. None leaves it, at most 1 with rows and b2 = 0.
      nesterov: with rows and tiles alike, b1 M + (1 - b1) G in place of M.
      block_mask: pytree of bools shaped as params or a prefix of it, True where a leaf holds
        matrices, or a function of params that makes it; None is all leaves of two axes or more.
        An attention kernel of [width, heads, head] is read as matrices of heads x head: store it
        as [width, heads head].

    Extra arguments of `update`:
      refresh: None: roots at counts 0, k, 2k, ... (`lax.cond`). A Python or NumPy bool: a static
        choice, with no cond in the program. A boolean array: cond. Ignored where none is kept.

    Returns:
      A transformation. It computes in float32 at least; its output has the dtype of the gradient,
      or of the parameter where that is wider, and is None where the gradient is. For
      an n x m matrix, n <= m, rows keep n m numbers of momentum, n b of C unless b2 = 0, and n b
      of roots unless k = 1. A block whose sample overflows keeps its C; where none is
      kept it stays in place. Momentum takes what comes, as in optax: a NaN in it spoils the matrix.
      On meshes `init` shards blocks like the rows that make them (else like the columns), if
      their number divides over the mesh axis. Choose a b that divides the rows of a device: then
      eight devices exchange 4 bytes (rms) for a 768 x 3072 matrix, at refreshes too. Where blocks
      straddle devices, the whole matrix is gathered (b = 128, 96 rows each: 9.8 MB); where columns
      are sharded, n b numbers are summed (.3 MB), and gathered where C or roots are kept. On
      explicit axes the same is computed, and the state lies as `init` laid it.

    Raises:
      ValueError: an argument is out of range; `block_mask` marks a leaf that holds no matrix; at
        `init` a leaf of params is no real number.
      TypeError: `block_size` is traced; `refresh` is no bool.

    Source: "OrthoSoph: Analyzing Trade-offs in Memory-Efficient Second-Order Optimization", 2025,
    section 3.1, which has the tiles but prints no update; see `orthosoph`.

    >>> import jax.numpy as jnp
    >>> G = jnp.array([[3., 0., 0.], [0., 0., -.5]])
    >>> tx = scale_by_blocks(rms=None)
    >>> out, state = tx.update(G, tx.init(G))
    >>> print(out.round(2))                        # about sqrt(3) times an orthogonal factor
    [[ 1.73  0.    0.  ]
     [ 0.    0.   -1.73]]
    """
    _checks.decays(b1=b1, b2=b2, b2_numbers=b2_numbers)
    _check(eps, block_size, update_interval, form, mu_dtype, rms)
    rows = form == "rows"
    every_update = not isinstance(update_interval, jax.Array) and bool(update_interval == 1)
    cuts_of = functools.partial(_cuts, block_mask, rows=rows, block_size=block_size)

    forgetful = isinstance(b2, int | float) and b2 == 0

    def drops(cut):
        return forgetful and isinstance(cut, _Tiles)

    def kept(cuts, C):
        """What the state holds of C: nothing that the next update would not use."""
        return [jnp.zeros([], C.dtype) if drops(cut) else C for cut, C in zip(cuts, C, strict=True)]

    def init(params):
        _checks.real_leaves("scale_by_blocks", params)
        _checks.decays_in_leaves(params, b1=b1, b2=b2, b2_numbers=b2_numbers)
        cuts, leaves = jax.tree.leaves(cuts_of(params)), jax.tree.leaves(params)
        C = [cut.zeros(x) for cut, x in zip(cuts, leaves, strict=True)]
        Z = [cut.identity(C) for cut, C in zip(cuts, C, strict=True)]
        return ScaleByBlocksState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            curvature=_unboxed(params, kept(cuts, C)),
            root=() if every_update else _unboxed(params, Z),
        )

    def computing(b1, b2, eps, b2_numbers, update_interval, rms, due):
        def average(count, cut, g, ahead, C):
            numbers = isinstance(cut, _Numbers)
            S = cut.sample(ahead if rows and not numbers else g, mean=rows)
            if drops(cut):
                return jnp.where(cut.finite(S), S, 0)
            decay = b2_numbers if rows and numbers else b2
            weight = 1 - jnp.asarray(decay, C.dtype)
            weight = weight / _mass(decay, count, C.dtype) if rows else weight
            return jnp.where(cut.finite(S), (1 - weight) * C + weight * S, C)

        def norm_and_ridge(cut, C):
            norm = cut.norm(C)
            ridge = cut.relative(eps, norm) if rows else jnp.asarray(eps, norm.dtype)
            return norm, floored(ridge, norm, cut.b)

        def direction(count, g, m):
            b, ahead = jnp.asarray(b1, m.dtype), optax.safe_increment(count)
            mass, next_mass = (_mass(b, n, b.dtype) if rows else 1 for n in (count, ahead))
            return b * m / next_mass + (1 - b) * g / mass if nesterov else m / mass

        def compute(cuts, grads, old_mu, C, Z, count):
            """(directions, momentum, C, roots), of leaves."""
            grads = [widen(g) for g in grads]
            mu = [_decayed(b1, g, m) for g, m in zip(grads, old_mu, strict=True)]
            out = [direction(count, g, m) for g, m in zip(grads, mu, strict=True)]
            C = [average(count, *x) for x in zip(cuts, grads, out, C, strict=True)]

            def roots():
                return [
                    cut.root(C, *norm_and_ridge(cut, C)) for cut, C in zip(cuts, C, strict=True)
                ]

            def whiten(cut, m, C, Z):
                norm, ridge = norm_and_ridge(cut, C)
                # A block that has seen nothing, or only what overflows, stays where it is.
                scale = jnp.where(norm > 0, jax.lax.rsqrt(norm + ridge), 0)
                return cut.apply(Z * scale, m, rms)

            now = due
            if now is None:
                now = (count - 1) % jnp.asarray(update_interval, jnp.int32) == 0
            if isinstance(now, bool):
                Z = roots() if now else Z
            else:
                Z = jax.lax.cond(now, roots, lambda: Z)
            out = [whiten(*x) for x in zip(cuts, out, C, Z, strict=True)]
            return out, optax.tree.cast_like(mu, old_mu), kept(cuts, C), [] if every_update else Z

        return compute

    numbers = (b1, b2, eps, b2_numbers, update_interval, rms)

    @none_left_alone
    def update(updates, state, params=None, *, refresh=None, **unused):
        del unused
        _checks.real_numbers("the gradient", updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        old = (updates, state.mu, state.curvature, state.root)
        leaves, structures = zip(*map(jax.tree.flatten, old), strict=True)
        specs = tuple(jax.tree.map(spec_of, list(x)) for x in leaves)
        due = True if every_update else refresh_due(refresh, None)
        cuts, given = jax.tree.leaves(cuts_of(updates)), (*numbers, due)
        traced = [x for x in given if isinstance(x, jax.Array)]

        def function(traced, *arrays):  # what is closed over would keep its explicit axes
            rest = iter(traced)
            here = [next(rest) if isinstance(x, jax.Array) else x for x in given]
            return computing(*here)(cuts, *arrays)

        new = with_auto_axes(function, traced, *leaves, count, specs=specs)
        out, *rest = (s.unflatten(x) for s, x in zip(structures, new, strict=True))
        return cast_to_step(out, updates, params), ScaleByBlocksState(count, *rest)

    return optax.GradientTransformationExtraArgs(init, update)


def _mass(decay: ArrayLike, count: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """Total weight of `count` samples."""
    return 1 - jnp.asarray(decay, dtype) ** jnp.asarray(count, dtype)


def _decayed(decay: ArrayLike, x: jax.Array, average: jax.Array) -> jax.Array:
    d = jnp.asarray(decay, x.dtype)
    return d * average.astype(x.dtype) + (1 - d) * x


def _check(eps, block_size, update_interval, form, mu_dtype, rms) -> None:
    _checks.one_of("form", form, ("rows", "tiles"))
    _checks.in_range("eps", eps, 0, float("inf"), open_high=True)
    if not isinstance(block_size, int | np.integer):
        raise TypeError(
            f"block_size={block_size!r} makes shapes and must be a Python int; under "
            "optax.inject_hyperparams pass static_args=('block_size', ...)."
        )
    _checks.positive_integer("block_size", block_size)
    _checks.positive_integer("update_interval", update_interval, "1 takes roots at every update.")
    _checks.momentum_dtype("mu_dtype", mu_dtype)
    if rms is not None:
        _checks.in_range("rms", rms, 0, float("inf"), open_high=True)
        _checks.nonzero("rms", rms, "it stops all matrices; None leaves steps at their own length.")
