"""A batch that is split over a manual axis: unless the axis is named, the sample is rejected."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import jit
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sophia_optax import (
    diagnostics,
    gauss_newton_bartlett,
    hutchinson,
    sophia_g,
    sophia_h,
    value_grad_and_hessian,
)

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
PARAMS = {"w": jnp.ones((3, 2))}
OPTIMIZERS = {"hutchinson": sophia_h, "gauss_newton_bartlett": sophia_g}
every_sampler = pytest.mark.parametrize("name", OPTIMIZERS)


def loss(params, x):
    return jnp.mean(jnp.cosh(x @ params["w"]))


def logits(params, x):
    return x @ params["w"]


def norm_of_sample(tx, params, x, objective=loss):
    """The norm of the curvature after one update on this shard's rows."""
    extra = {"obj_fn": objective, "logits_fn": logits, "inputs": x}
    _, state = tx.update(params, tx.init(params), params, **extra)
    return diagnostics(state, quantiles=())["hessian_norm"]


def over(axes, function, *args, rows="d", check_vma=True):
    """`function` in a `shard_map` over eight devices."""
    specs = (P(), P(rows))
    shape = (8,) if len(axes) == 1 else (4, 2)
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    return jit(mapped)(*args)


@every_sampler
@pytest.mark.parametrize("check_vma", [True, False])
def test_an_axis_that_is_not_named_is_refused_with_the_argument_that_names_it(name, check_vma):
    """Otherwise curvature would be 8 times too large, or that of one shard."""

    def sample(params, x):
        return norm_of_sample(OPTIMIZERS[name](0.1), params, x)

    with pytest.raises(ValueError, match=rf"{name}: .*axis 'd'.*Pass `axis_name='d'`"):
        over(("d",), sample, PARAMS, X, check_vma=check_vma)


@every_sampler
def test_an_axis_of_pmap_is_refused_too(name):
    def sample(x):
        return norm_of_sample(OPTIMIZERS[name](0.1), PARAMS, x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapped = jax.pmap(sample, axis_name="d")
        with pytest.raises(ValueError, match="Pass `axis_name='d'`"):
            mapped(X.reshape(8, 1, 3))


@pytest.mark.parametrize("check_vma", [True, False])
def test_named_it_is_the_curvature_of_the_whole_batch(check_vma):
    def sample(params, x):
        return norm_of_sample(sophia_h(0.1, axis_name="d"), params, x)

    whole = norm_of_sample(sophia_h(0.1), PARAMS, X)
    sharded = over(("d",), sample, PARAMS, X, check_vma=check_vma)
    np.testing.assert_allclose(sharded, whole, rtol=1e-5)


@every_sampler
def test_of_two_axes_both_must_be_named(name):
    def sample(axis_name):
        return lambda params, x: norm_of_sample(
            OPTIMIZERS[name](0.1, axis_name=axis_name), params, x
        )

    with pytest.raises(ValueError, match="axis 'f'"):
        over(("d", "f"), sample("d"), PARAMS, X, rows=("d", "f"))
    assert over(("d", "f"), sample(("d", "f")), PARAMS, X, rows=("d", "f")) > 0


def test_an_objective_that_averages_by_itself_needs_no_name():
    def sample(params, x):
        averaged = lambda params, x: jax.lax.pmean(loss(params, x), "d")  # noqa: E731
        return norm_of_sample(sophia_h(0.1), params, x, averaged)

    whole = norm_of_sample(sophia_h(0.1), PARAMS, X)
    np.testing.assert_allclose(over(("d",), sample, PARAMS, X), whole, rtol=1e-5)


def test_a_run_of_its_own_on_each_shard_says_so():
    """An empty `axis_name` declares eight independent runs, each on its row."""

    def sample(params, x):
        norm = norm_of_sample(sophia_h(0.1, axis_name=()), params, x)
        return norm[None]

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    runs = jax.shard_map(sample, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"))
    many = jax.tree.map(lambda w: jnp.concatenate([w] * 8), PARAMS)
    alone = [norm_of_sample(sophia_h(0.1), PARAMS, X[i : i + 1]) for i in range(8)]
    np.testing.assert_allclose(jit(runs)(many, X), jnp.stack(alone), rtol=1e-5)


@every_sampler
def test_runs_of_their_own_that_share_parameters_are_refused(name):
    """Otherwise curvature would be the sum over all shards, 8 times too large."""

    def sample(params, x):
        return norm_of_sample(OPTIMIZERS[name](0.1, axis_name=()), params, x)

    def marked(params, x):
        return sample(jax.lax.pcast(params, ("d",), to="varying"), x)[None]

    with pytest.raises(ValueError, match=r"jax.lax.pcast\(params, \('d',\), to='varying'\)"):
        over(("d",), sample, PARAMS, X)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    runs = jax.shard_map(marked, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    alone = [norm_of_sample(OPTIMIZERS[name](0.1), PARAMS, X[i : i + 1]) for i in range(8)]
    np.testing.assert_allclose(jit(runs)(PARAMS, X), jnp.stack(alone), rtol=1e-5)


@pytest.mark.parametrize("shards", [2, 4])
def test_groups_of_a_run_of_its_own_run_one_after_the_other(shards):
    """With parallel groups their sums would end in a bare AssertionError of jax."""
    x = jnp.tile(X, (4, 1))

    def sample(shards):
        estimator = gauss_newton_bartlett(groups=4, parallel_groups=shards)
        return lambda params, x: norm_of_sample(
            sophia_g(0.1, estimator=estimator, axis_name=()), params, x
        )[None]

    def own_runs(params, x):
        return sample(shards)(jax.lax.pcast(params, ("d",), to="varying"), x)

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    runs = jax.shard_map(own_runs, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    alone = [sample(1)(PARAMS, x[4 * i : 4 * i + 4])[0] for i in range(8)]
    np.testing.assert_allclose(jit(runs)(PARAMS, x), jnp.stack(alone), rtol=1e-5)


@every_sampler
def test_parameters_that_differ_over_a_named_axis_are_refused(name):
    def sample(params, x):
        params = jax.lax.pcast(params, "d", to="varying")
        return norm_of_sample(OPTIMIZERS[name](0.1, axis_name="d"), params, x)

    with pytest.raises(ValueError, match="would mix parameters"):
        over(("d",), sample, PARAMS, X)


def test_value_grad_and_hessian_refuses_it_as_well():
    def losses(outputs, x):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.zeros(len(x), int))

    def shared(estimator, **extra):
        def sample(params, x):
            return value_grad_and_hessian(estimator)(
                jax.random.key(0), params, obj_fn=loss, logits_fn=logits, loss_fn=losses, inputs=x,
                **extra,
            )  # fmt: skip

        return sample

    for estimator in (hutchinson(), gauss_newton_bartlett()):
        with pytest.raises(ValueError, match="Pass `axis_name='d'`"):
            over(("d",), shared(estimator), PARAMS, X)
    whole = shared(hutchinson())(PARAMS, X)
    sharded = over(("d",), shared(hutchinson(), axis_name="d"), PARAMS, X)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), sharded, whole)


def test_a_sampled_loss_is_held_to_the_same_rule():
    def sampled_loss(params, x, key):
        return jnp.sum(jnp.square(x @ params["w"])), x.size

    def sample(axis_name):
        return lambda params, x: gauss_newton_bartlett()(
            jax.random.key(0), params, None, sampled_loss_fn=sampled_loss, inputs=x,
            axis_name=axis_name,
        )["w"]  # fmt: skip

    with pytest.raises(ValueError, match="Pass `axis_name='d'`"):
        over(("d",), sample(None), PARAMS, X)
    assert over(("d",), sample("d"), PARAMS, X).shape == (3, 2)
