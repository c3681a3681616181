"""When curvature is sampled, and how samples are averaged."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_optax import checks
from sophia_optax.estimators.base import Estimator, check_estimator
from sophia_optax.numerics import accumulation_dtype, decayed, is_fixed_at_one, widen, widest
from sophia_optax.sharding import AxisName, varying_like
from sophia_optax.transforms.none_leaves import skip_none_leaves
from sophia_optax.transforms.stochastic_rounding import round_to

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
    rejected: jax.Array  # int32 (), samples rejected because they were not finite
    age: jax.Array  # int32 (), updates since h last took a sample
    mass: jax.Array  # float32 (), total weight of the samples in h; it tends to 1
    h: optax.Updates  # float32 or `dtype`, shaped as params: the average before bias correction
    zero: jax.Array  # int32 (), averaged samples that were 0 in every coordinate
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
    reject: str = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Gradients in, smoothed diagonal curvature out.

        h <- decay h + (1 - decay) ĥ          at a refresh, before h is used
        mass <- decay mass + (1 - decay)      at a refresh
        out = h / mass  (0 while mass is 0), or h without bias correction

    A refresh takes one sample ĥ of the curvature. It is due at counts 0, k, 2k, ...

    Args:
      estimator: makes a sample ĥ, such as `hutchinson()` or `gauss_newton_bartlett()`. None if
        every sample is passed to `update` as `hessian`.
      decay: β2 in [0, 1), per sample.
      update_interval: k >= 1, updates between samples.
      bias_correction: divide by mass, so that h is unbiased from the first sample on.
      seed: the sample at count n uses the key `fold_in(key(seed), n)`.
      dtype: dtype of h; None is float32, or float64 where the parameter is. "bfloat16" is rounded
        stochastically, because rounding to nearest stalls short of the mean.
      axis_name: axis of an enclosing `shard_map` over which batches are sharded.
      reject: what a NaN or infinite value in a sample does.
        "sample": the whole sample is rejected and counted in `rejected`. The test costs one more
        pass over the sample at each refresh.
        "coordinate": that coordinate keeps its h and all others are averaged. Nothing is counted,
        neither in `rejected` nor in `zero`.
        "auto": "coordinate" for samples that the counter takes at every update
        (`update_interval=1`, neither `refresh` nor `hessian` passed), where the pass would be paid
        at every step; "sample" for all others.

    Extra arguments of `update`:
      hessian: a pytree shaped as params, a sample made outside; the estimator is not called.
      refresh: None refreshes now if `hessian` is passed, else when the counter says so
        (`lax.cond`). A Python or NumPy bool is a static choice, with no cond in the program. A
        boolean array is a cond. With False the estimator needs no arguments.
      **extra: passed on to the estimator.

    Returns:
      A transformation. Its output is float32 at least. Its state, `HessianEstimateState`, holds
      counters, `mass` and `h`, each in its own buffer. A sample that is 0 in every coordinate is
      averaged and counted in `zero`: either the objective has no curvature, or the estimator cannot
      see it, as with batch normalisation of a single row.

    Raises:
      ValueError: an argument is out of range; `dtype` cannot hold curvature; `hessian` has the
        wrong structure or shapes; at `init` a leaf of params is not real floating point, or
        `decay` is 1 in the dtype of a leaf.
      TypeError: `refresh` is not a bool; `estimator` cannot be called as one.

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
    checks.one_of("reject", reject, ("auto", "sample", "coordinate"))
    if estimator is not None:
        check_estimator(estimator)
    rule = _SampledAverage(
        estimator, decay, update_interval, bias_correction, seed, dtype, axis_name, reject
    )
    return optax.GradientTransformationExtraArgs(rule.init, skip_none_leaves(rule.update))


@dataclasses.dataclass(frozen=True, eq=False)
class _SampledAverage:
    """The arguments of `hessian_estimate`, and its `init` and `update`."""

    estimator: Estimator | None
    decay: ArrayLike
    update_interval: ArrayLike
    bias_correction: bool
    seed: ArrayLike
    dtype: DTypeLike | None
    axis_name: AxisName
    reject: str

    def init(self, params):
        checks.real_leaves("hessian_estimate", params)
        checks.decays_in_leaves(params, decay=self.decay)

        def zeros(x):  # like x, to lie on a mesh with explicit axes as x does
            return jnp.zeros_like(x, dtype=self.dtype or accumulation_dtype(x))

        def zero(dtype=jnp.int32):  # a buffer of its own, so that the state may be donated
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

    def update(self, updates, state, params=None, *, hessian=None, refresh=None, **extra):
        key = jax.random.fold_in(jax.random.key(self.seed), state.count)
        if hessian is not None:
            checks.same_shapes("hessian", hessian, updates)

        def absorb(state):
            sample = hessian
            if sample is None:
                sample = self.draw(key, params, updates, extra)
            by_coordinate = self.rejects_coordinates(hessian, refresh)
            return _absorb(state, sample, self.decay, _rounding_key(key), by_coordinate)

        due = refresh_due(refresh, hessian)
        if due is None:
            interval = self.update_interval
            due = self.every_update or state.count % jnp.asarray(interval, jnp.int32) == 0
        if isinstance(due, bool):
            new = absorb(state) if due else _keep(state)
        else:
            new = jax.lax.cond(due, absorb, _keep, state)
        new = new._replace(count=optax.safe_increment(state.count))
        return (_corrected(new) if self.bias_correction else jax.tree.map(widen, new.h)), new

    def draw(self, key, params, updates, extra):
        """One sample of the estimator."""
        cure = "Pass a sample, or give hessian_estimate an estimator instead of None."
        take: Any = checks.given("hessian_estimate(None)", "hessian", self.estimator, cure)
        return take(key, params, updates, axis_name=self.axis_name, **extra)

    @property
    def every_update(self) -> bool:
        """Whether the interval is known to be 1; a traced interval is not known."""
        return is_fixed_at_one(self.update_interval)

    def rejects_coordinates(self, hessian: Any, refresh: Any) -> bool:
        """Whether non-finite values are rejected by coordinate instead of with their sample."""
        if self.reject == "auto":
            return self.every_update and refresh is None and hessian is None
        return self.reject == "coordinate"


def refresh_due(refresh: Any, hessian: Any) -> bool | jax.Array | None:
    """A bool if the choice is static, an array if it is traced, None if the counter decides."""
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


def _keep(state: HessianEstimateState) -> HessianEstimateState:
    return state._replace(age=optax.safe_increment(state.age))


def _absorb(state, sample, decay, key, by_coordinate: bool) -> HessianEstimateState:
    """Averages one more sample, or rejects it."""
    average = functools.partial(decayed, decay)
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
    h = jax.tree.map(jnp.where, finite, jax.tree.map(average, sample, old), old)
    return HessianEstimateState(
        count=state.count,
        accepted=jnp.where(ok, optax.safe_increment(state.accepted), state.accepted),
        rejected=jnp.where(ok, state.rejected, optax.safe_increment(state.rejected)),
        age=jnp.where(ok, 0, optax.safe_increment(state.age)),
        mass=jnp.where(ok, average(jnp.ones_like(state.mass), state.mass), state.mass),
        h=round_to(state.h, h, key),
        zero=jnp.where(ok & nothing, optax.safe_increment(state.zero), state.zero),
        zero_leaves=jnp.where(ok, zero_leaves, state.zero_leaves),
    )


def _look_over(sample: optax.Updates) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(whether all values are finite, number of leaves that are 0, whether all leaves are 0)."""
    leaves = [x for x in jax.tree.leaves(sample) if x.size]
    # One pass serves both tests, as x - x is 0 or NaN. XLA on CPU fuses a sum into the pass that
    # makes the sample; `all` would write an array.
    sums = [jnp.sum(jnp.abs(jnp.sign(x)) + (x - x)) for x in leaves]
    ok = functools.reduce(jnp.logical_and, map(jnp.isfinite, sums), jnp.asarray(True))
    number = sum(((x == 0).astype(jnp.int32) for x in sums), jnp.zeros([], jnp.int32))
    return ok, number, (number == len(leaves)) & (len(leaves) > 0)


def _corrected(state: HessianEstimateState) -> optax.Updates:
    """H / mass, and 0 while no sample has been accepted."""
    empty = state.mass == 0
    scale = jnp.where(empty, 0, 1 / jnp.where(empty, 1, state.mass))
    return jax.tree.map(lambda h: widen(h) * scale.astype(accumulation_dtype(h)), state.h)
