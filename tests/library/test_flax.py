"""Flax models under our optimizers: dropout and batch normalisation, NNX and Linen."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import EXACT, assert_close
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sophia_optax import diagnostics, gauss_newton_bartlett, hutchinson, soaa, sophia_g, sophia_h
from sophia_optax import value_grad_and_hessian as shared
from sophia_optax.flax import TrainState, of_params

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 3)).astype(np.float32)
BATCH = {"x": X, "y": np.arange(16) % 2}
KEY = jax.random.key(0)
ROWS = {1: [X], 4: np.split(X, 4)}  # consecutive rows, group by group
MOMENTUM = 0.99  # of BatchNorm, by default


class Model(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.dropout = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.dropout(self.norm(x)))


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


LOSS = {"loss_fn": cross_entropy}


def logits(model, batch):
    return model(batch["x"])


def loss(model, batch):
    return cross_entropy(logits(model, batch), batch).mean()


def evaluated(function):
    """In evaluation mode: with running averages and without dropout."""

    def of_model(model, batch):
        model.eval()
        return function(model, batch)

    return of_model


def by_hand(params, batch):
    """The logits of `Model` in evaluation, whose running averages are 0 and 1."""
    x = batch["x"] / np.sqrt(1 + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    return x @ params["linear"]["kernel"] + params["linear"]["bias"]


def loss_by_hand(params, batch):
    return cross_entropy(by_hand(params, batch), batch).mean()


def variables(model, of=...):
    return nnx.to_pure_dict(nnx.state(model, of))


def bits(model):
    """The variables of a model, with PRNG keys as numbers."""

    def number(x):
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    return jax.tree.map(number, variables(model))


ESTIMATORS = {
    "hutchinson": (
        sophia_h(0.1),
        lambda model: {"obj_fn": of_params(evaluated(loss), model)},
        {"obj_fn": loss_by_hand},
    ),
    "gauss_newton_bartlett": (
        sophia_g(0.1, estimator=gauss_newton_bartlett(groups=4)),
        lambda model: {"logits_fn": of_params(evaluated(logits), model)},
        {"logits_fn": by_hand},
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_module_moves_as_the_same_function_by_hand(name):
    tx, ours, theirs = ESTIMATORS[name]
    model = Model(nnx.Rngs(0))
    optimizer, before = nnx.Optimizer(model, tx, wrt=nnx.Param), bits(model)

    @nnx.jit
    def step(model, optimizer):
        model.eval()
        grads = nnx.grad(loss)(model, BATCH)
        model.train()
        optimizer.update(model, grads, **ours(model), inputs=BATCH)

    @jax.jit
    def expected(params):
        grads = jax.grad(loss_by_hand)(params, BATCH)
        updates, _ = tx.update(grads, tx.init(params), params, **theirs, inputs=BATCH)
        return optax.apply_updates(params, updates)

    wanted = expected(variables(model, nnx.Param))
    step(model, optimizer)
    assert_close(variables(model, nnx.Param), wanted, rtol=1e-4, atol=1e-5)
    assert not model.dropout.deterministic and not model.norm.use_running_average
    for name in ("norm", "dropout"):  # `update` moved neither averages nor counters
        kept = {k: v for k, v in before[name].items() if k not in ("scale", "bias")}
        after = {k: bits(model)[name][k] for k in kept}
        assert_close(after, kept, **EXACT)


def test_a_mask_of_dropout_is_the_one_that_the_model_draws_next():
    model = Model(nnx.Rngs(0))
    function = of_params(logits, model)
    assert_close(function(nnx.state(model, nnx.Param), BATCH), nnx.clone(model)(X), rtol=1e-5)
    assert_close(function(variables(model, nnx.Param), BATCH), model(X), rtol=1e-5)


def test_a_key_of_the_inputs_gives_each_group_a_mask_of_its_own():
    """The sample is then the mean over groups, each by a mask from its own key."""
    model = Model(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)

    def reseeded(model, batch):
        nnx.reseed(model, default=batch["key"])
        return model(batch["x"])

    @jax.jit
    def samples(params):
        forward = of_params(reseeded, model)
        batch = {"x": X, "key": KEY}
        ours = gauss_newton_bartlett(groups=2)(KEY, params, None, logits_fn=forward, inputs=batch)
        sample = functools.partial(gauss_newton_bartlett(), logits_fn=forward)
        numbers, keys = jnp.arange(16), jax.random.split(KEY, 2)
        parts = [
            sample(KEY, params, None, inputs={"x": X[g], "key": key}, row_numbers=numbers[g])
            for g, key in ((slice(0, 8), keys[0]), (slice(8, 16), keys[1]))
        ]
        return ours, jax.tree.map(lambda *x: sum(x) / 2, *parts)

    assert_close(*samples(params), rtol=1e-4, atol=1e-7)


def averages_by_hand(groups):
    """The mean over groups of running averages after one batch, from means 0 and variances 1."""
    means = [(1 - MOMENTUM) * rows.mean(0) for rows in ROWS[groups]]
    variances = [MOMENTUM + (1 - MOMENTUM) * rows.var(0) for rows in ROWS[groups]]
    return {"mean": np.mean(means, 0), "var": np.mean(variances, 0)}


def assert_trained_once(model, groups):
    """Running averages, and the counter of dropout."""
    assert_close(
        variables(model, nnx.BatchStat)["norm"], averages_by_hand(groups), rtol=1e-4, atol=1e-6
    )
    assert model.dropout.rngs.count[...] == 1


@pytest.mark.parametrize("groups", ROWS)
def test_shared_passes_return_the_state_of_an_ordinary_pass_of_each_group(groups):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sophia_g(0.1), wrt=nnx.Param)
    sample = shared(gauss_newton_bartlett(groups=groups), has_state=True)

    @nnx.jit
    def step(model, optimizer):
        forward = of_params(logits, model, has_state=True)
        params = nnx.state(model, nnx.Param)
        (value, state), grads, h = sample(KEY, params, logits_fn=forward, **LOSS, inputs=BATCH)
        optimizer.update(model, grads, hessian=h)
        nnx.update(model, state)
        return value

    once = nnx.clone(model)
    wanted = loss(once, BATCH)
    value = step(model, optimizer)
    assert_trained_once(model, groups)
    if groups == 1:  # one dropout mask over the whole batch
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        assert_close(bits(model)["dropout"], bits(once)["dropout"], **EXACT)
        assert_close(bits(model)["norm"]["mean"], bits(once)["norm"]["mean"], rtol=1e-5)


def test_a_part_of_the_rows_and_the_others_weigh_by_their_number():
    model = Model(nnx.Rngs(0))
    sample = shared(gauss_newton_bartlett(batch_fraction=1 / 4), has_state=True)
    forward = of_params(logits, model, has_state=True)
    (_, state), _, _ = jax.jit(
        lambda params: sample(KEY, params, logits_fn=forward, **LOSS, inputs=BATCH)
    )(nnx.state(model, nnx.Param))
    nnx.update(model, state)
    sampled = np.arange(16) % 4 == 0
    wanted = (1 - MOMENTUM) * (X[sampled].mean(0) / 4 + X[~sampled].mean(0) * 3 / 4)
    np.testing.assert_allclose(model.norm.mean[...], wanted, rtol=1e-4, atol=1e-7)


def test_the_objective_of_hutchinson_returns_the_state_as_auxiliary_output():
    model = Model(nnx.Rngs(0))
    objective = of_params(loss, model, has_state=True)
    (value, state), grads, h = jax.jit(
        lambda params: shared(hutchinson(), has_aux=True)(
            KEY, params, obj_fn=objective, inputs=BATCH
        )
    )(nnx.state(model, nnx.Param))
    np.testing.assert_allclose(value, loss(nnx.clone(model), BATCH), rtol=1e-5)
    nnx.update(model, state)
    assert_trained_once(model, 1)
    assert jax.tree.structure(grads) == jax.tree.structure(h)


def test_on_a_mesh_the_state_is_the_mean_over_shards():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    model = Model(nnx.Rngs(0))
    sample = shared(gauss_newton_bartlett(), has_state=True)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    def pass_of_shards(params, rest, batch):
        forward = of_params(logits, nnx.merge(graph, params, rest, copy=True), has_state=True)
        told = {"inputs": batch, "axis_name": "data"}
        (_, state), _, _ = sample(KEY, params, logits_fn=forward, **LOSS, **told)
        return state

    nnx.update(model, pass_of_shards(params, rest, BATCH))
    assert_trained_once(model, 4)


def test_parameters_of_another_filter_are_refused_with_the_cure():
    model = Model(nnx.Rngs(0))
    function = of_params(logits, model, wrt=nnx.BatchStat)
    with pytest.raises(ValueError, match=r"have 4 leaves.* the 2 that wrt=.*the `wrt` of nnx.Opt"):
        function(nnx.state(model, nnx.Param), BATCH)


# ---------------------------------------------------------------- Linen


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


class WithAverages(TrainState):
    batch_stats: dict


def linen_state(tx):
    model = LinenModel()
    made = model.init(KEY, X, train=False)
    return WithAverages.create(
        apply_fn=model.apply, params=made["params"], tx=tx, batch_stats=made["batch_stats"]
    )


def test_a_linen_state_takes_its_fields_and_the_optimizer_the_rest():
    tx = sophia_g(0.1)
    sample = shared(gauss_newton_bartlett(groups=4), has_state=True)

    @jax.jit
    def step(state):
        def forward(params, batch):
            return state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                batch["x"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": batch["key"]},
            )

        told = {"inputs": BATCH | {"key": jax.random.key(1)}}
        (_, moved), grads, h = sample(KEY, state.params, logits_fn=forward, **LOSS, **told)
        new = state.apply_gradients(grads=grads, hessian=h, batch_stats=moved["batch_stats"])
        updates, opt_state = tx.update(grads, state.opt_state, state.params, hessian=h)
        return new, (optax.apply_updates(state.params, updates), opt_state)

    state, wanted = step(linen_state(tx))
    assert_close((state.params, state.opt_state), wanted, rtol=1e-5)
    assert state.step == 1 and state.tx is tx
    averages = state.batch_stats["BatchNorm_0"]
    assert_close(averages, averages_by_hand(4), rtol=1e-4, atol=1e-6)
    for _ in range(2):
        state, _ = step(state)
    assert step._cache_size() == 2  # Flax's first counter is a Python int


def test_a_linen_state_serves_optimizers_that_know_no_extra_arguments():
    """As in Flax, including leaves that a gradient overwrites (`_overwrite_with_gradient`)."""
    params = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.ones(())}}
    tx = optax.GradientTransformation(*optax.sgd(0.5))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    grads = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.full((), 3.0)}}
    state = state.apply_gradients(grads=grads, value=1.0)
    assert_close(state.params["params"], {"w": jnp.full(2, 0.5)}, **EXACT)
    assert state.params["_overwrite_with_gradient"]["scale"] == 3


def test_without_flax_the_error_says_what_to_install():
    code = "import sys; sys.modules['flax'] = None; import sophia_optax.flax"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "sophia_optax.flax needs Flax" in result.stderr and "pip install flax" in result.stderr


@pytest.mark.parametrize("tx", [sophia_h(0.1), soaa(0.1, total_steps=10)], ids=["sophia_h", "soaa"])
def test_diagnostics_read_the_state_of_an_nnx_optimizer(tx):
    """nnx.Optimizer puts each scalar in a box."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads, params = nnx.state(model, nnx.Param), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer.update(model, grads, hessian=grads, value=1.0)
    _, state = tx.update(params, tx.init(params), params, hessian=params, value=1.0)
    have, want = (diagnostics(x, quantiles=0.5) for x in (optimizer.opt_state, state))
    assert have.keys() == want.keys()
    np.testing.assert_allclose([*have.values()], [*want.values()], rtol=1e-6)
