"""When curvature is sampled, and how samples are averaged."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax import checks
from sophia_optax.estimators.base import Estimator, check_estimator
from sophia_optax.numerics import accumulation_dtype, widen, widest
from sophia_optax.sharding import AxisName, varying_like
from sophia_optax.transforms.holes import none_left_alone

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


class HessianEstimateState(NamedTuple):
    """State of `hessian_estimate`.

    >>> import jax.numpy as jnp, optax
    >>> from sophia_optax import sophia_h
    >>> params, h, tx = jnp.zeros(2), jnp.array([1., 2.]), sophia_h(1e-3)
    >>> _, state = tx.update(h, tx.init(params), params, hessian=h)
    >>> state = optax.tree.get(state, "HessianEstimateState")
    >>> print(state.h / state.mass, state.accepted)
    [1. 2.] 1
    """

    count: jax.Array  # int32 (), updates seen  # pyright: ignore[reportIncompatibleMethodOverride]
    accepted: jax.Array  # int32 (), samples averaged into h
    rejected: jax.Array  # int32 (), samples refused because they were not finite
    age: jax.Array  # int32 (), updates since h last took a sample
    mass: jax.Array  # float32 (), total weight of the samples in h; 1 in the limit
    h: optax.Updates  # float32 or `dtype`, shaped as params: the uncorrected average
    zero: jax.Array  # int32 (), samples averaged that were 0 in every coordinate
    zero_leaves: jax.Array  # int32 (), leaves in which the last sample was 0 everywhere


def hessian_estimate(
    estimator: Estimator | None,
    *,
    decay: ArrayLike = 0.99,
    update_interval: ArrayLike = 10,
    bias_correction: bool = True,
    seed: ArrayLike = 0,
    dtype: DTypeLike | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradients in, smoothed diagonal curvature out.

        h <- decay h + (1 - decay) ĥ          when a refresh is due, before h is used
        mass <- decay mass + (1 - decay)      likewise
        out = h / mass  (0 while mass is 0), or h without bias correction

    A refresh is due at counts 0, k, 2k, ... A sample with a value that is not finite is refused
    whole and counted. Where h changes on every update (`update_interval=1`, driven by the
    counter) such values are refused coordinate by coordinate, and not counted: a test of the
    whole tree at every step would cost a pass over the parameters.

    Args:
      estimator: makes one sample ĥ, such as `hutchinson()` or `gauss_newton_bartlett()`; None where
        every sample comes from outside, as `hessian`.
      decay: β2 in [0, 1), per sample.
      update_interval: k >= 1, updates between samples.
      bias_correction: divide by mass, so that h is right from the first sample on.
      seed: the sample at count n uses `fold_in(key(seed), n)`.
      dtype: dtype of h; None is float32, or float64 where the parameter is. "bfloat16" is rounded
        stochastically, since rounding to nearest stalls short of the mean.
      axis_name: axis of an enclosing `shard_map` over which batches are sharded.

    Extra arguments of `update`:
      hessian: pytree shaped as params, a sample made outside; replaces the call of the estimator.
      refresh: None: now if `hessian` is given, else when due by the counter (`lax.cond`). A
        Python or NumPy bool: a static choice, with no cond in the program. A boolean array: cond.
        False needs no argument of the estimator.
      **extra: passed on to the estimator.

    Returns:
      A transformation. Its state holds the counters, `mass` and `h`, all in buffers of their own.
      Its output is float32 at least. A sample of 0 in every coordinate is averaged, and counted
      as `zero`: it says that the objective does not bend at all, or that the estimator cannot see
      it (batch normalisation of one row). Where values are refused coordinate by coordinate, it is
      not counted either.

    Raises:
      ValueError: an argument is out of range; `dtype` cannot hold curvature; `hessian` has the
        wrong structure or shapes; at `init` a leaf of params is no real number, or `decay` is 1 in
        the dtype of a leaf.
      TypeError: `refresh` is no bool; `estimator` cannot be called as one.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 3, lines 6-10; bias correction is ours.

    >>> import jax.numpy as jnp
    >>> from sophia_optax import squared_gradient
    >>> tx = hessian_estimate(squared_gradient(), decay=.9, update_interval=1)
    >>> state = tx.init(jnp.zeros(2))
    >>> h, state = tx.update(jnp.array([1., 2.]), state)
    >>> print(h, state.mass.round(1))
    [1. 4.] 0.1
    """
    checks.decays(decay=decay)
    checks.positive_integer("update_interval", update_interval, "1 samples at every update.")
    checks.curvature_dtype("dtype", dtype)
    if estimator is not None:
        check_estimator(estimator)
    every_update = not isinstance(update_interval, jax.Array) and bool(update_interval == 1)

    def init(params):
        def zeros(x):  # like x: the sharding of x is carried over on meshes with explicit axes
            return jnp.zeros_like(x, dtype=dtype or accumulation_dtype(x))

        checks.real_leaves("hessian_estimate", params)
        checks.decays_in_leaves(params, decay=decay)

        def zero(dtype=jnp.int32):
            return varying_like(jnp.zeros([], dtype), params)

        return HessianEstimateState(
            count=jnp.zeros([], jnp.int32),
            accepted=zero(),
            rejected=zero(),
            age=zero(),
            mass=zero(widest(params)),
            h=jax.tree.map(zeros, params),
            zero=zero(),
            zero_leaves=zero(),
        )

    @none_left_alone
    def update(updates, state, params=None, *, hessian=None, refresh=None, **extra):
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        if hessian is not None:
            checks.same_shapes("hessian", hessian, updates)

        def absorb(state):
            sample = hessian
            if sample is None:
                take: Any = checks.given(
                    "hessian_estimate(None)",
                    "hessian",
                    estimator,
                    "Pass a sample, or give an estimator in the place of None.",
                )
                sample = take(key, params, updates, axis_name=axis_name, **extra)
            by_coordinate = every_update and refresh is None and hessian is None
            return _absorb(state, sample, decay, _rounding_key(key), by_coordinate)

        def keep(state):
            return state._replace(age=optax.safe_increment(state.age))

        due = refresh_due(refresh, hessian)
        if due is None:
            due = every_update or state.count % jnp.asarray(update_interval, jnp.int32) == 0
        if isinstance(due, bool):
            new = absorb(state) if due else keep(state)
        else:
            new = jax.lax.cond(due, absorb, keep, state)
        new = new._replace(count=optax.safe_increment(state.count))
        return (_corrected(new) if bias_correction else jax.tree.map(widen, new.h)), new

    return optax.GradientTransformationExtraArgs(init, update)


def refresh_due(refresh: Any, hessian: Any) -> bool | jax.Array | None:
    """A bool where the choice is static, an array where it is not, None where the counter rules."""
    if refresh is None:
        return True if hessian is not None else None
    if isinstance(refresh, bool | np.bool_):
        return bool(refresh)
    if getattr(refresh, "dtype", None) != np.bool_ or refresh.shape != ():
        masked = isinstance(refresh, optax.MaskedNode)
        raise TypeError(
            f"`refresh` must be None, a bool, or a boolean array of shape (), not {refresh!r}."
            + " It was masked because params is a single array: wrap params in a dict." * masked
        )
    return jnp.asarray(refresh)


def _rounding_key(key: jax.Array) -> jax.Array:
    # No row, shard, leaf or draw has this number, so no estimator derives the same key.
    return jax.random.fold_in(key, jnp.uint32(0xFFFFFFFF))


def _absorb(state, sample, decay, key, by_coordinate: bool) -> HessianEstimateState:
    """One more sample into the average, or a rejection."""

    def average(h, x):
        d = jnp.asarray(decay, x.dtype)
        return d * h.astype(x.dtype) + (1 - d) * x

    checks.real_numbers("the curvature sample", sample)
    # Cast before the test: a float64 sample can be finite where its float32 is not.
    sample = jax.tree.map(lambda h, x: jnp.asarray(x, accumulation_dtype(h)), state.h, sample)
    zero_leaves, nothing = state.zero_leaves, jnp.asarray(False)
    if by_coordinate:
        ok, finite = jnp.asarray(True), jax.tree.map(jnp.isfinite, sample)
    else:
        ok, zero_leaves, nothing = _look_over(sample)
        finite = jax.tree.map(lambda _: ok, sample)
    old = jax.tree.map(widen, state.h)
    h = jax.tree.map(jnp.where, finite, jax.tree.map(average, old, sample), old)
    return HessianEstimateState(
        count=state.count,
        accepted=jnp.where(ok, optax.safe_increment(state.accepted), state.accepted),
        rejected=jnp.where(ok, state.rejected, optax.safe_increment(state.rejected)),
        age=jnp.where(ok, 0, optax.safe_increment(state.age)),
        mass=jnp.where(ok, average(state.mass, jnp.ones_like(state.mass)), state.mass),
        h=round_to(state.h, h, key),  # keeps to the bit what was rounded before
        zero=jnp.where(ok & nothing, optax.safe_increment(state.zero), state.zero),
        zero_leaves=jnp.where(ok, zero_leaves, state.zero_leaves),
    )


def _look_over(sample: optax.Updates) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(whether all is finite, number of leaves that are 0 everywhere, whether all are)."""
    leaves = [x for x in jax.tree.leaves(sample) if x.size]
    # One pass for both: x - x is 0 or NaN. XLA on CPU fuses a sum; `all` would write an array.
    sums = [jnp.sum(jnp.abs(jnp.sign(x)) + (x - x)) for x in leaves]
    ok = functools.reduce(jnp.logical_and, map(jnp.isfinite, sums), jnp.asarray(True))
    number = sum(((x == 0).astype(jnp.int32) for x in sums), jnp.zeros([], jnp.int32))
    return ok, number, (number == len(leaves)) & (len(leaves) > 0)


def _corrected(state: HessianEstimateState) -> optax.Updates:
    """H / mass, and 0 while no sample was accepted."""
    empty = state.mass == 0
    scale = jnp.where(empty, 0, 1 / jnp.where(empty, 1, state.mass))
    return jax.tree.map(lambda h: widen(h) * scale.astype(accumulation_dtype(h)), state.h)


def round_to(like: optax.Updates, tree: optax.Updates, key: jax.Array) -> optax.Updates:
    """Casts to the dtypes of `like`, to bfloat16 stochastically: the mean is then kept."""
    leaves, structure = jax.tree.flatten(tree)
    seeds = structure.unflatten(list(jax.random.bits(key, (len(leaves),), jnp.uint32)))

    def cast(seed, x, like):
        if like.dtype != jnp.bfloat16:
            return x.astype(like.dtype)
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        rounded = (bits + _noise(seed, x.shape)) & jnp.uint32(0xFFFF0000)
        return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(jnp.bfloat16)

    return jax.tree.map(cast, seeds, tree, like)


def _noise(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 below 2^16, another one for each place: a hash of its index and the seed.

    Threefry is a loop of its own on CPU, which keeps all its numbers: 13 bytes a parameter.
    """
    x = jnp.uint32(0)
    for axis, n in enumerate(shape):
        x = x * jnp.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = x + seed
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x >> 16
