"""Momentum whitened block by block along the diagonal: the direction of `orthosoph`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax import checks
from sophia_optax.numerics import cast_to_step, decayed, is_fixed_at_one, widen
from sophia_optax.sharding import spec_of, with_auto_axes
from sophia_optax.transforms.hessian_estimate import refresh_due
from sophia_optax.transforms.inverse_root import floored
from sophia_optax.transforms.none_leaves import skip_none_leaves
from sophia_optax.transforms.tiles import Elementwise, Mask, Tiles, cuts_of, unboxed

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


class ScaleByBlocksState(NamedTuple):
    """State of `scale_by_blocks`; a matrix is cut into R x S blocks of b rows.

    Leaves that are shaped unlike their parameter are stored without Flax's box around it.

    >>> import jax.numpy as jnp
    >>> state = scale_by_blocks(b2=.9, block_size=2).init(jnp.zeros((4, 6)))
    >>> print(state.mu.dtype, state.curvature.shape)
    bfloat16 (2, 1, 2, 2)
    """

    count: jax.Array  # int32 (), updates seen  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates  # `mu_dtype`, shaped as params: the momentum before bias correction
    curvature: Any  # C, float32 at least: [..., R, S, b, b], or as the leaf; 0 if none is kept
    root: Any  # Z [..., R, S, b, b], or 1 for elementwise leaves; () if the update interval is 1


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
    r"""Momentum whitened by the curvature of blocks of rows, or of tiles.

    A matrix leaf holds matrices in its last two axes. Each is cut into blocks of b rows and c
    columns, padded with zeros at the edges:

        M <- b1 M + (1 - b1) G
        C <- b2 C + (1 - b2) S                      b x b, one for each block
        out = (C + ridge I)^(-1/2) M

    form="rows": rows run along the shorter side of the matrix, and c is the whole longer side.
    S = M Mᵀ / c, M and C are bias-corrected, and ridge = eps ‖C‖_F. With b2 = 0 each block of rows
    becomes sqrt(c) times its polar factor; with a single block this is Muon.
    form="tiles": c = b, S = G Gᵀ, without bias correction, and ridge = eps.

    All other leaves are elementwise: each number is a block of its own, with S = g². With rows
    their decay is b2_vector, which makes them Adam without an eps.

    Roots are taken every k updates. Between two of them the shape of the root stays and its scale
    follows C: out = Z M / sqrt(s) with s = ‖C‖_F + ridge, and Z = ((C + ridge I) / s)^(-1/2) from
    the last refresh. With a fixed scale, a first gradient that is 0, or far smaller than the next
    ones, would make steps far too long.

    Args:
      b1: decay of the momentum, in [0, 1).
      b2: decay of C, in [0, 1), per update. With the Python number 0 no C is kept.
      eps: ridge, relative to ‖C‖_F with rows, absolute with tiles; at least 4 b ulp ‖C‖_F.
      block_size: b, a static integer; a matrix with fewer rows has smaller blocks.
      update_interval: k >= 1, updates between roots. With the Python number 1 no root is kept.
      form: "rows" or "tiles".
      b2_vector: with rows, decay of the second moment of elementwise leaves, such as vectors.
      mu_dtype: dtype of M; None is the parameter's. bfloat16 rounds to nearest, as in optax, so M
        stops moving where (1 - b1) G is below 1/256 of it.
      rms: root mean square of each matrix's output. The default is about AdamW's, so its learning
        rates fit. None does not rescale; the root mean square is then at most 1 with rows and
        b2 = 0.
      nesterov: whiten b1 M + (1 - b1) G instead of M, with either form.
      block_mask: which leaves are matrix leaves: a pytree of bools shaped as params or a prefix of
        it, or a function of params that returns one. None selects all leaves of two axes or more.
        An attention kernel of [width, heads, head] is read as matrices of heads x head: store it
        as [width, heads head].
      b2_numbers: deprecated name of `b2_vector`. It warns.

    Extra arguments of `update`:
      renew: None takes roots at counts 0, k, 2k, ... (`lax.cond`). A Python or NumPy bool is a
        static choice, with no cond in the program. A boolean array is a cond. It is ignored if no
        root is kept.
      refresh: read if `renew` is None, so that one argument serves a chain with curvature too.

    Returns:
      A transformation. It computes in float32 at least; its output has the dtype of the gradient,
      or of the parameter if that is wider, and is None where the gradient is. For an n x m matrix,
      n <= m, the state with rows holds n m numbers of momentum, n b of C unless b2 = 0, and n b of
      roots unless k = 1. A block whose sample overflows keeps its C, or does not move if no C is
      kept. Non-finite gradients enter the momentum, as in optax: a NaN makes the whole matrix NaN.
      On a mesh, `init` shards blocks like the rows that they are made of, or else like the columns,
      if the number of blocks divides over the mesh axis. Choose b so that it divides the rows on a
      device: then eight devices exchange 4 bytes (rms) for a 768 x 3072 matrix, at refreshes too.
      If blocks straddle devices, the whole matrix is gathered (b = 128 with 96 rows on each: 9.8
      MB). If columns are sharded, n b numbers are summed (.3 MB), and gathered if C or roots are
      kept. Meshes with explicit axes compute the same, and the state stays as `init` placed it.

    Raises:
      ValueError: an argument is out of range; `block_mask` selects a leaf with fewer than two axes;
        at `init` a leaf of params is not real floating point.
      TypeError: `block_size` is traced; `refresh` is not a bool.

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
    owner = "scale_by_blocks"
    b2_vector = checks.renamed(owner, "b2_numbers", b2_numbers, "b2_vector", b2_vector, 0.95)
    checks.decays(b1=b1, b2=b2, b2_vector=b2_vector)
    _check(eps, block_size, update_interval, form, mu_dtype, rms)
    whitening = _Whitening(
        b1,
        b2,
        eps,
        b2_vector,
        update_interval,
        rms,
        form,
        block_size,
        block_mask,
        mu_dtype,
        nesterov,
    )
    return optax.GradientTransformationExtraArgs(whitening.init, skip_none_leaves(whitening.update))


@dataclasses.dataclass(frozen=True, eq=False)
class _Whitening:
    """The arguments of `scale_by_blocks`, and its `init` and `update`.

    Trees are lists of leaves in `whiten` and in what it calls; `cuts` says how each leaf is cut.
    """

    b1: ArrayLike  # these six may be traced
    b2: ArrayLike
    eps: ArrayLike
    b2_vector: ArrayLike
    update_interval: ArrayLike
    rms: ArrayLike | None
    form: str
    block_size: int
    block_mask: Mask
    mu_dtype: DTypeLike | None
    nesterov: bool

    @property
    def rows(self) -> bool:
        return self.form == "rows"

    @property
    def every_update(self) -> bool:
        """Whether the interval is known to be 1, so that no root is used twice."""
        return is_fixed_at_one(self.update_interval)

    def cuts(self, tree: optax.Params) -> list[Elementwise | Tiles]:
        cuts = cuts_of(self.block_mask, tree, rows=self.rows, block_size=self.block_size)
        return jax.tree.leaves(cuts)

    def drops(self, cut: Elementwise | Tiles) -> bool:
        """Whether a leaf keeps no C, since the next update would not read it."""
        forgets = isinstance(self.b2, int | float) and self.b2 == 0
        return forgets and isinstance(cut, Tiles)

    def kept(self, cuts, C):
        return [
            jnp.zeros([], C.dtype) if self.drops(cut) else C for cut, C in zip(cuts, C, strict=True)
        ]

    def init(self, params):
        checks.real_leaves("scale_by_blocks", params)
        checks.decays_in_leaves(params, b1=self.b1, b2=self.b2, b2_vector=self.b2_vector)
        cuts, leaves = self.cuts(params), jax.tree.leaves(params)
        C = [cut.zeros(x) for cut, x in zip(cuts, leaves, strict=True)]
        Z = [cut.identity(C) for cut, C in zip(cuts, C, strict=True)]
        return ScaleByBlocksState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=self.mu_dtype),
            curvature=unboxed(params, self.kept(cuts, C)),
            root=() if self.every_update else unboxed(params, Z),
        )

    def update(self, updates, state, params=None, *, renew=None, refresh=None, **unused):
        del unused
        checks.real_numbers("the gradient", updates)
        chosen = refresh if renew is None else renew
        count = jnp.asarray(optax.safe_increment(state.count))
        old = (updates, state.mu, state.curvature, state.root)
        leaves, structures = zip(*map(jax.tree.flatten, old), strict=True)
        specs = tuple(jax.tree.map(spec_of, list(x)) for x in leaves)
        cuts, due = self.cuts(updates), True if self.every_update else refresh_due(chosen, None)
        given = {name: getattr(self, name) for name in _NUMBERS} | {"due": due}
        traced = {name: x for name, x in given.items() if isinstance(x, jax.Array)}

        def whiten(traced, *arrays):  # passed in, since closures would keep their explicit axes
            numbers = given | traced
            due = numbers.pop("due")
            return dataclasses.replace(self, **numbers).whiten(cuts, due, *arrays)

        new = with_auto_axes(whiten, traced, *leaves, count, specs=specs)
        out, *rest = (s.unflatten(x) for s, x in zip(structures, new, strict=True))
        return cast_to_step(out, updates, params), ScaleByBlocksState(count, *rest)

    def whiten(self, cuts, due, grads, old_mu, C, Z, count):
        """(directions, momentum, C, roots) after the gradients of this update."""
        grads = [widen(g) for g in grads]
        mu = [decayed(self.b1, g, m) for g, m in zip(grads, old_mu, strict=True)]
        out = [self.ahead(count, g, m) for g, m in zip(grads, mu, strict=True)]
        C = [self.average(count, *x) for x in zip(cuts, grads, out, C, strict=True)]

        def roots():
            return [cut.root(C, *self.ridge(cut, C)) for cut, C in zip(cuts, C, strict=True)]

        if due is None:
            due = (count - 1) % jnp.asarray(self.update_interval, jnp.int32) == 0
        if isinstance(due, bool):
            Z = roots() if due else Z
        else:
            Z = jax.lax.cond(due, roots, lambda: Z)
        out = [self.apply(*x) for x in zip(cuts, out, C, Z, strict=True)]
        roots_kept = [] if self.every_update else Z
        return out, optax.tree.cast_like(mu, old_mu), self.kept(cuts, C), roots_kept

    def ahead(self, count, g, m):
        """The momentum to whiten: with `nesterov` the next one, if this gradient came again."""
        b, next_count = jnp.asarray(self.b1, m.dtype), optax.safe_increment(count)
        mass, next_mass = (_mass(b, n, b.dtype) if self.rows else 1 for n in (count, next_count))
        return b * m / next_mass + (1 - b) * g / mass if self.nesterov else m / mass

    def average(self, count, cut, g, ahead, C):
        """C after this update's sample; a block whose sample is not finite keeps its C."""
        elementwise = isinstance(cut, Elementwise)
        S = cut.sample(ahead if self.rows and not elementwise else g, mean=self.rows)
        if self.drops(cut):
            return jnp.where(cut.finite(S), S, 0)
        decay = self.b2_vector if self.rows and elementwise else self.b2
        weight = 1 - jnp.asarray(decay, C.dtype)
        weight = weight / _mass(decay, count, C.dtype) if self.rows else weight
        return jnp.where(cut.finite(S), (1 - weight) * C + weight * S, C)

    def ridge(self, cut, C):
        """(‖C‖_F, ridge) of each block."""
        norm = cut.norm(C)
        ridge = cut.relative(self.eps, norm) if self.rows else jnp.asarray(self.eps, norm.dtype)
        return norm, floored(ridge, norm, cut.b)

    def apply(self, cut, m, C, Z):
        norm, ridge = self.ridge(cut, C)
        # A block that has seen no gradient, or only gradients that overflow, does not move.
        scale = jnp.where(norm > 0, jax.lax.rsqrt(norm + ridge), 0)
        return cut.apply(Z * scale, m, self.rms)


_NUMBERS = ("b1", "b2", "eps", "b2_vector", "update_interval", "rms")
"""Arguments that may be traced, as by `optax.inject_hyperparams`."""


def _mass(decay: ArrayLike, count: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """Total weight of `count` samples in an average with this decay."""
    return 1 - jnp.asarray(decay, dtype) ** jnp.asarray(count, dtype)


def _check(eps, block_size, update_interval, form, mu_dtype, rms) -> None:
    checks.one_of("form", form, ("rows", "tiles"))
    checks.in_range("eps", eps, 0, float("inf"), open_high=True)
    if not isinstance(block_size, int | np.integer):
        raise TypeError(
            f"block_size={block_size!r} determines shapes and must be a Python int; under "
            "optax.inject_hyperparams pass static_args=('block_size', ...)."
        )
    checks.positive_integer("block_size", block_size)
    checks.positive_integer("update_interval", update_interval, "1 takes roots at every update.")
    checks.momentum_dtype("mu_dtype", mu_dtype)
    if rms is not None:
        checks.in_range("rms", rms, 0, float("inf"), open_high=True)
        checks.nonzero("rms", rms, "it stops all matrices; None keeps steps at their own length.")
