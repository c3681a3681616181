"""Scalars that show how an optimizer uses its curvature, read from its state."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from sophia_optax import checks
from sophia_optax.transforms.clip_by_ratio import ClipByRatioState
from sophia_optax.transforms.hessian_estimate import HessianEstimateState
from sophia_optax.transforms.trust_region import TrustRegionState

ArrayLike = jax.typing.ArrayLike

_FIELDS = {
    ClipByRatioState: {
        "clipped_fraction": "clipped",
        "floored_fraction": "floored",
        "momentum_nonfinite_leaves": "nonfinite",
    },
    HessianEstimateState: {
        "hessian_age": "age",
        "hessian_accepted": "accepted",
        "hessian_rejected": "rejected",
        "hessian_zero_samples": "zero",
        "hessian_zero_leaves": "zero_leaves",
    },
    TrustRegionState: {"trust_radius": "radius", "predicted_reduction": "predicted"},
}
_MOMENT = optax.tree_utils.NamedTupleKey(ClipByRatioState.__name__, "second_moment")
_SAMPLE_SIZE = 2**16


def diagnostics(
    opt_state: optax.OptState, quantiles: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """Scalars about clipping, curvature and trust region, from an optimizer state of any nesting.

    Args:
      opt_state: the state of a transformation that contains `clip_by_ratio`, `hessian_estimate` or
        `trust_region`, inside any of optax's wrappers. Arrays may be on a mesh or on the host.
      quantiles: numbers in [0, 1], such as (.1, .5, .9): adds the norm of the curvature and these
        quantiles of its coordinates. `()` adds only the norm, which reads h twice. None reads only
        scalars.

    Returns:
      A flat dict of float32 scalars. From `clip_by_ratio`, as of the last refresh:
        clipped_fraction: share of clipped coordinates among those above the floor; NaN if no
          coordinate is above it, and before the first refresh.
        win_rate: 1 - clipped_fraction (the authors advise .1 to .5).
        floored_fraction: share of all coordinates whose curvature is below the floor. They take
          a sign step and count in neither of the two fractions above.
        momentum_nonfinite_leaves: leaves whose momentum holds a NaN or infinite number. It came
          with a gradient, and the parameter is no longer finite either.
      From `hessian_estimate`, unless it is the `second_moment` of a `clip_by_ratio`:
        hessian_age: updates since h last took a sample; 0 if it takes one at every update.
        hessian_accepted, hessian_rejected: samples averaged, and samples rejected as non-finite.
        hessian_zero_samples: averaged samples that were 0 in every coordinate: the estimator
          sees no curvature at all, as with batch normalisation and one row per group.
        hessian_zero_leaves: leaves in which the last sample was 0 everywhere.
        hessian_norm: Euclidean norm of h / mass, the bias-corrected average, even if the
          transformation does not correct its output; 0 before the first sample.
        hessian_quantile_0.5: the median of the coordinates of h / mass, and likewise for the other
          quantiles. Exact up to 65536 coordinates. Of a larger tree every n-th coordinate is read,
          at most 65536 and always the same; as large a random sample would place the median
          at a rank of .5 ± .002.
      From `trust_region`:
        trust_radius: r, from which the next step starts.
        predicted_reduction: predicted reduction of the loss by the last step.
      If the state holds several states of one kind, names are prefixed with the keys of the dicts
      around them, such as the labels of `optax.partition`: "matrices.win_rate". If these are equal,
      they are prefixed with the whole path. Other optimizers give an empty dict.

    Raises:
      ValueError: a quantile is outside [0, 1].

    >>> import jax.numpy as jnp
    >>> from sophia_optax import sophia_h
    >>> params, h = {"w": jnp.zeros(4)}, {"w": jnp.array([4., 2., 2., 1.])}
    >>> tx = sophia_h(1e-3)
    >>> _, state = tx.update(h, tx.init(params), params, hessian=h)
    >>> for name, value in diagnostics(state, quantiles=.5).items():
    ...     print(name, value.round(2))
    clipped_fraction 1.0
    win_rate 0.0
    floored_fraction 0.0
    momentum_nonfinite_leaves 0.0
    hessian_age 0.0
    hessian_accepted 1.0
    hessian_rejected 0.0
    hessian_zero_samples 0.0
    hessian_zero_leaves 0.0
    hessian_norm 5.0
    hessian_quantile_0.5 2.0
    """
    points = None if quantiles is None else tuple(map(float, np.ravel(quantiles)))
    for q in points or ():
        checks.in_range("quantiles", q, 0, 1)
    found: dict[str, jax.Array] = {}
    for prefix, state in _states(opt_state):
        for name, value in _scalars(state, points).items():
            found[prefix + name] = value.astype(jnp.float32)
    return found


def _scalars(state: Any, points: tuple[float, ...] | None) -> dict[str, jax.Array]:
    if isinstance(state, ClipByRatioState) and isinstance(state.clipped, tuple):
        return {}  # statistics are off
    fields = {name: _bare(getattr(state, field)) for name, field in _FIELDS[type(state)].items()}
    if isinstance(state, ClipByRatioState):
        clipped = jnp.where(_bare(state.floored) < 1, _bare(state.clipped), jnp.nan)
        return {"clipped_fraction": clipped, "win_rate": 1 - clipped} | {
            name: x for name, x in fields.items() if name != "clipped_fraction"
        }
    if isinstance(state, HessianEstimateState) and points is not None:
        norm, values = _norm_and_quantiles(state.h, _bare(state.mass), points)
        fields["hessian_norm"] = norm
        fields |= {f"hessian_quantile_{q:g}": x for q, x in zip(points, values, strict=True)}
    return fields


def _bare(scalar: Any) -> jax.Array:
    """The scalar, out of the box that `nnx.Optimizer` puts it in."""
    (leaf,) = jax.tree.leaves(scalar)
    return leaf


def _states(opt_state: optax.OptState) -> list[tuple[str, Any]]:
    """(prefix of the names, state) of each state that is reported."""
    found = [
        (path, state)
        for kind in _FIELDS
        for path, state in optax.tree.get_all_with_path(opt_state, kind.__name__)
        if isinstance(state, kind) and _MOMENT not in path
    ]
    for lead in (lambda path: "", _labels, jax.tree_util.keystr):
        leads = [lead(path) for path, _ in found]
        kinds = [type(state) for _, state in found]
        if len(set(zip(kinds, leads, strict=True))) == len(found):
            break
    return [
        (f"{lead}." if lead else "", state) for lead, (_, state) in zip(leads, found, strict=True)
    ]


def _labels(path: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


@functools.partial(jax.jit, static_argnames="points")  # else every operation copies the tree
def _norm_and_quantiles(h: optax.Updates, mass: jax.Array, points: tuple[float, ...]):
    """Norm and quantiles of h / mass; both are 0 before the first sample."""
    scale = 1 / jnp.where(mass == 0, 1, mass).astype(jnp.float32)
    wide = jax.tree.map(lambda h: h.astype(jnp.float32), h)
    largest = optax.tree.norm(wide, ord=jnp.inf)
    # Scaled first, as squares of curvature may over- or underflow.
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    norm = unit * optax.tree.norm(jax.tree.map(lambda h: h / unit, wide))
    values = jnp.quantile(_sample(h), jnp.asarray(points, jnp.float32))
    return norm * scale, values * scale


def _sample(tree: optax.Updates) -> jax.Array:
    """float32[at most 2^16]: every n-th coordinate of the tree, read as one long vector.

    n is coprime to the size of each leaf; otherwise some columns would never be read. Coordinates
    are gathered by index, since slicing a flattened leaf would first gather a sharded leaf.
    """
    leaves = [jnp.atleast_1d(x) for x in jax.tree.leaves(tree) if x.size]
    sizes = [x.size for x in leaves]
    stride = max(-(-sum(sizes) // _SAMPLE_SIZE), 1)
    while math.gcd(stride, math.prod(sizes)) > 1:
        stride += 1
    first, parts = 0, [jnp.zeros([0 if leaves else 1], jnp.float32)]
    for x in leaves:
        places = np.unravel_index(np.arange(first, x.size, stride), x.shape)
        first = (first - x.size) % stride
        replicated = jax.typeof(x).sharding.update(spec=PartitionSpec())  # explicit axes need it
        parts.append(x.at[places].get(out_sharding=replicated).astype(jnp.float32))
    return jnp.concatenate(parts)
