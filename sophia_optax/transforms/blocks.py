"""Curvature in blocks along the diagonal: what stands behind `orthosoph`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax import checks
from sophia_optax.numerics import cast_to_step, widen
from sophia_optax.sharding import spec_of, with_auto_axes
from sophia_optax.transforms.hessian_estimate import refresh_due
from sophia_optax.transforms.inverse_root import floored
from sophia_optax.transforms.none_leaves import skip_none_leaves
from sophia_optax.transforms.tiles import Elementwise, Mask, Tiles, cuts_of, unboxed

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


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
    b2_vector: ArrayLike = 0.95,
    mu_dtype: DTypeLike | None = "bfloat16",
    rms: ArrayLike | None = 0.2,
    nesterov: bool = True,
    block_mask: Mask = None,
    b2_numbers: ArrayLike | None = None,
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
    rows is b2_vector: that is Adam, without an eps.

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
      b2_vector: with rows, decay of the second moment of what is in no matrix.
      mu_dtype: dtype of M; None is the parameter's. bfloat16 rounds to nearest, as in optax, and
        stalls where (1 - b1) G is under a 256th of M.
      rms: root mean square of each matrix's output; .2 is about AdamW's, whose learning rates
        then fit. None leaves it, at most 1 with rows and b2 = 0.
      nesterov: with rows and tiles alike, b1 M + (1 - b1) G in place of M.
      block_mask: pytree of bools shaped as params or a prefix of it, True where a leaf holds
        matrices, or a function of params that makes it; None is all leaves of two axes or more.
        An attention kernel of [width, heads, head] is read as matrices of heads x head: store it
        as [width, heads head].
      b2_numbers: the old name of `b2_vector`, which it replaces where it is given.

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
    b2_vector = b2_vector if b2_numbers is None else b2_numbers
    checks.decays(b1=b1, b2=b2, b2_vector=b2_vector)
    _check(eps, block_size, update_interval, form, mu_dtype, rms)
    rows = form == "rows"
    every_update = not isinstance(update_interval, jax.Array) and bool(update_interval == 1)
    cut_of_leaves = functools.partial(cuts_of, block_mask, rows=rows, block_size=block_size)

    forgetful = isinstance(b2, int | float) and b2 == 0

    def drops(cut):
        return forgetful and isinstance(cut, Tiles)

    def kept(cuts, C):
        """What the state holds of C: nothing that the next update would not use."""
        return [jnp.zeros([], C.dtype) if drops(cut) else C for cut, C in zip(cuts, C, strict=True)]

    def init(params):
        checks.real_leaves("scale_by_blocks", params)
        checks.decays_in_leaves(params, b1=b1, b2=b2, b2_vector=b2_vector)
        cuts, leaves = jax.tree.leaves(cut_of_leaves(params)), jax.tree.leaves(params)
        C = [cut.zeros(x) for cut, x in zip(cuts, leaves, strict=True)]
        Z = [cut.identity(C) for cut, C in zip(cuts, C, strict=True)]
        return ScaleByBlocksState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            curvature=unboxed(params, kept(cuts, C)),
            root=() if every_update else unboxed(params, Z),
        )

    def computing(b1, b2, eps, b2_vector, update_interval, rms, due):
        def average(count, cut, g, ahead, C):
            numbers = isinstance(cut, Elementwise)
            S = cut.sample(ahead if rows and not numbers else g, mean=rows)
            if drops(cut):
                return jnp.where(cut.finite(S), S, 0)
            decay = b2_vector if rows and numbers else b2
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

    numbers = (b1, b2, eps, b2_vector, update_interval, rms)

    @skip_none_leaves
    def update(updates, state, params=None, *, refresh=None, **unused):
        del unused
        checks.real_numbers("the gradient", updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        old = (updates, state.mu, state.curvature, state.root)
        leaves, structures = zip(*map(jax.tree.flatten, old), strict=True)
        specs = tuple(jax.tree.map(spec_of, list(x)) for x in leaves)
        due = True if every_update else refresh_due(refresh, None)
        cuts, given = jax.tree.leaves(cut_of_leaves(updates)), (*numbers, due)
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
    checks.one_of("form", form, ("rows", "tiles"))
    checks.in_range("eps", eps, 0, float("inf"), open_high=True)
    if not isinstance(block_size, int | np.integer):
        raise TypeError(
            f"block_size={block_size!r} makes shapes and must be a Python int; under "
            "optax.inject_hyperparams pass static_args=('block_size', ...)."
        )
    checks.positive_integer("block_size", block_size)
    checks.positive_integer("update_interval", update_interval, "1 takes roots at every update.")
    checks.momentum_dtype("mu_dtype", mu_dtype)
    if rms is not None:
        checks.in_range("rms", rms, 0, float("inf"), open_high=True)
        checks.nonzero("rms", rms, "it stops all matrices; None leaves steps at their own length.")
