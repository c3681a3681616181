"""What the optimizer's state says about the curvature it uses."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sophia_optax.ratio import ClipByRatioState
from sophia_optax.transform import HessianEstimateState

_FIELDS = {
    "clipped_fraction": (ClipByRatioState, "clipped"),
    "floored_fraction": (ClipByRatioState, "floored"),
    "hessian_age": (HessianEstimateState, "age"),
    "hessian_accepted": (HessianEstimateState, "accepted"),
    "hessian_rejected": (HessianEstimateState, "rejected"),
}


def diagnostics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Scalars about clipping and curvature, from an optimizer state of any nesting.

    Args:
      opt_state: the state of a transformation that holds `clip_by_ratio` or `hessian_estimate`,
        inside any of optax's wrappers.

    Returns:
      A flat dict of float32 scalars, as of the last refresh:
        clipped_fraction: share of clipped coordinates among those above the floor, 0 if none is.
        win_rate: its complement (the authors advise .1 to .5).
        floored_fraction: share of all coordinates whose curvature is below the floor; they take
          a sign step, and are counted in neither of the two above.
        hessian_age: updates since h last took a sample.
        hessian_accepted, hessian_rejected: samples averaged, and refused as not finite.
      Where the state holds several such transformations, each name leads with its path. Empty for
      optimizers without curvature.

    >>> import jax.numpy as jnp
    >>> from sophia_optax import sophia_g
    >>> sorted(diagnostics(sophia_g(1e-3).init(jnp.zeros(3))))[:3]
    ['clipped_fraction', 'floored_fraction', 'hessian_accepted']
    """
    found: dict[str, jax.Array] = {}
    for name, (kind, field) in _FIELDS.items():
        for prefix, value in _values(opt_state, kind, field):
            found[prefix + name] = value.astype(jnp.float32)
            if name == "clipped_fraction":
                found[prefix + "win_rate"] = 1 - found[prefix + name]
    return found


def _values(opt_state: Any, kind: type, field: str) -> list[tuple[str, jax.Array]]:
    def is_ours(path, value):
        # A state fetched to the host holds NumPy arrays; statistics that are off hold ().
        return getattr(path[-1], "tuple_name", None) == kind.__name__ and hasattr(value, "dtype")

    hits = optax.tree.get_all_with_path(opt_state, field, filtering=is_ours)
    if len(hits) == 1:
        return [("", hits[0][1])]
    return [(jax.tree_util.keystr(path[:-1]) + ".", value) for path, value in hits]
