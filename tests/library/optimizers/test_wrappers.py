"""Every optimizer of ours inside the wrappers of optax, Flax and Orbax.

If a wrapper calls `update` unchanged, every factory is run, and the variants with `-m slow`.
"""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    EXACT,
    EXTRA,
    OPTIMIZERS,
    PARAMS,
    STEPS,
    assert_close,
    every_factory,
    every_optimizer,
    every_optimizer_with_a_model,
    every_optimizer_without_a_model,
    gradient,
    jit,
    obj_fn,
    run,
    start,
    step,
)
from flax import nnx
from flax.training.train_state import TrainState

from sophia_optax import flax

with warnings.catch_warnings():  # its import warns of its own deprecations
    warnings.simplefilter("ignore")
    import orbax.checkpoint.experimental.v1 as orbax

SAMPLE = {n: np.float32(0.7) + np.abs(x) for n, x in PARAMS.items()}
ONLY_W = {"w": True, "b": False, "s": False}


# ---------------------------------------------------------------- inject_hyperparams


def injected(opt, **changes):
    static = set(opt.parameters) - set(opt.numbers) - {"seed"}
    factory = optax.inject_hyperparams(
        opt.factory, static_args=static, hyperparam_dtype=jnp.float32
    )
    return opt(factory, **changes)


@every_factory
def test_injected_schedules_of_every_number_equal_the_numbers(opt):
    """All numbers are traced, since each depends on the count."""
    schedules = {n: lambda count, x=x: x + 0 * count for n, x in opt.numbers.items()}
    tx = injected(opt, **(schedules | {"learning_rate": opt.numbers["learning_rate"]}))
    params, state = jit(lambda p: run(tx, p))(start())
    assert set(opt.numbers) <= set(state.hyperparams)
    floats = {n for n, x in opt.numbers.items() if not isinstance(x, int)}
    assert all(state.hyperparams[n].dtype == jnp.float32 for n in floats)
    plain = opt.plain[0], opt.plain[1][0]  # after which comes the count of a schedule
    assert_close((params, state.inner_state[0]), plain, **opt.tolerance)


@pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
def test_injected_over_bfloat16_parameters_momentum_keeps_its_dtype(mu_dtype):
    """The momentum of `optax.ema`, and so of `optax.adamw`, would become the injected float32."""
    tx, params = injected(OPTIMIZERS["sophia_h"], mu_dtype=mu_dtype), start("bfloat16")
    state = tx.init(params)
    _, after = jax.eval_shape(lambda p, s: tx.update(p, s, p, **EXTRA), params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after.inner_state, state.inner_state)


# ---------------------------------------------------------------- MultiSteps


def multi_steps(opt, micro, told):
    """(parameters, inner state, model evaluations) after `STEPS` steps of `micro` micro-steps."""
    calls = []

    def counted(*args, **extra):
        jax.debug.callback(lambda: calls.append(1))
        return opt.model(*args, **extra)

    tx = optax.MultiSteps(opt(estimator=counted) if opt.model else opt(), every_k_schedule=micro)
    every = opt.numbers.get("update_interval", 1)

    def body(carry, i):
        params, state = carry
        last = state.mini_step == micro - 1
        due = last & (state.gradient_step % every == 0)
        # The gradients of the micro-batches differ; their mean is that of the batch.
        scale = 1 + (i % micro - (micro - 1) / 2)
        return step(tx, params, state, scale, refresh=due if told else None), None

    def program(params):
        steps = jnp.arange(micro * STEPS)
        return jax.lax.scan(body, (params, tx.init(params)), steps)[0]

    params, state = jax.block_until_ready(jit(program)(start()))
    jax.effects_barrier()
    return params, state.inner_opt_state, len(calls)


@every_factory
def test_multi_steps_told_to_refresh_on_the_last_micro_step_samples_once_per_due_step(opt):
    *carry, calls = multi_steps(opt, micro=3, told=True)
    assert calls == (4 if opt.model else 0)  # at counts 0, 3, 6, 9
    assert_close(tuple(carry), opt.plain, **opt.tolerance)


def test_multi_steps_left_to_the_counter_samples_on_every_micro_step_of_a_due_step():
    opt = OPTIMIZERS["sophia_h"]
    *carry, calls = multi_steps(opt, micro=3, told=False)
    assert calls == 3 * 4
    assert_close(tuple(carry), opt.plain, **opt.tolerance)


# ---------------------------------------------------------------- parts of the tree

FREEZE = {n: not on for n, on in ONLY_W.items()}
WRAPPERS = {
    "masked": lambda tx, **kw: optax.masked(tx, ONLY_W, **kw),
    "partition": lambda tx, **kw: optax.partition(
        {True: tx, False: optax.set_to_zero()}, ONLY_W, **kw
    ),
    "selective_transform": lambda tx: optax.transforms.selective_transform(tx, freeze_mask=FREEZE),
}


def one_update(tx, params, **extra):
    """The updates of one step with a gradient that is nowhere zero."""
    grads = jax.tree.map(lambda x: x + 1, params)
    update = jit(lambda g, s, p: tx.update(g, s, p, value=1.0, **EXTRA, **extra)[0])
    return update(grads, tx.init(params), params)


@functools.cache
def alone(opt):
    """The update of a tree that holds only "w", which a part of a larger tree must equal."""
    sample = {"hessian": {"w": SAMPLE["w"]}} if opt.model else {}
    return one_update(opt(), {"w": start()["w"]}, **sample)["w"]


@every_optimizer
@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_part_of_a_tree_is_updated_as_if_alone_given_a_sample_of_the_whole(opt, wrapper):
    """If the model is needed, a sample is passed in the documented way."""
    route = {"mask_compatible_extra_args": True} if opt.model else {}
    sample = {"hessian": SAMPLE} if opt.model else {}
    updates = one_update(WRAPPERS[wrapper](opt(), **route), start(), **sample)
    assert_close(updates["w"], alone(opt))
    kept = start()["b"] + 1 if wrapper == "masked" else jnp.zeros_like(start()["b"])
    assert_close(updates["b"], kept, **EXACT)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@every_optimizer_with_a_model
def test_part_of_a_tree_is_refused_with_the_cure_where_the_model_is_needed(opt, wrapper):
    """`selective_transform` builds its own partition and cannot mask a sample in the same way."""
    tx = WRAPPERS[wrapper](opt())
    with pytest.raises(ValueError, match=r"masked params.*pass it: .*hessian=sample"):
        one_update(tx, start())
    with pytest.raises(ValueError, match=r"wrapper with `mask_compatible_extra_args=True`"):
        one_update(tx, start(), hessian=SAMPLE)


@every_optimizer_without_a_model
def test_selective_transform_updates_as_if_alone(opt):
    updates = one_update(WRAPPERS["selective_transform"](opt()), start())
    assert_close(updates["w"], alone(opt))
    assert not updates["b"].any()


@every_optimizer
def test_an_empty_group_over_a_single_array_is_refused_with_the_cure(opt):
    """The wrapper masks every extra argument, since each has the structure of params."""
    groups = {"ours": opt(), "other": optax.identity()}
    tx = optax.partition(groups, "other", mask_compatible_extra_args=True)
    x = jnp.ones(3)
    arguments = EXTRA | {"value": 1.0, "refresh": jnp.asarray(True)}
    for name in set(opt.reads) - {"inputs", "hessian"}:  # where those are of no harm
        with pytest.raises((ValueError, TypeError), match=r"single array.*wrap"):
            tx.update(x, tx.init(x), x, **{name: arguments[name]})


@every_optimizer
def test_frozen_leaves_stay_and_the_others_move_as_without(opt):
    sample = {"hessian": SAMPLE} if opt.model else {}
    tx = optax.chain(opt(), optax.transforms.freeze(FREEZE))
    updates, plain = (one_update(tx, start(), **sample) for tx in (tx, opt()))
    assert not updates["b"].any() and plain["b"].all()
    assert_close(updates["w"], plain["w"])


# ---------------------------------------------------------------- the others


@every_factory
def test_apply_if_finite_skips_a_bad_gradient_and_nothing_else(opt):
    tx = optax.apply_if_finite(opt(), max_consecutive_errors=2)

    def program(params):
        scales = jnp.ones(STEPS + 1).at[4].set(jnp.nan)
        carry = (params, tx.init(params))
        return jax.lax.scan(lambda c, scale: (step(tx, *c, scale), None), carry, scales)[0]

    params, state = jit(program)(start())
    assert state.total_notfinite == 1
    assert_close((params, state.inner_state), opt.plain, **opt.tolerance)


class Model(nnx.Module):
    def __init__(self):
        self.w, self.b, self.s = (nnx.Param(start()[n]) for n in "wbs")


def loss(params, batch):
    return obj_fn(nnx.to_pure_dict(params), batch)


@every_factory
def test_nnx_optimizer_passes_the_extra_arguments_on(opt):
    model = Model()
    graph, arrays = nnx.split((model, nnx.Optimizer(model, opt(), wrt=nnx.Param)))

    @jit
    def train(arrays):
        model, optimizer = nnx.merge(graph, arrays)
        grads, value = gradient(nnx.state(model, nnx.Param), objective=loss)
        optimizer.update(model, grads, **value, **EXTRA)
        return nnx.state((model, optimizer))

    for _ in range(STEPS):
        arrays = train(arrays)
    model, _ = nnx.merge(graph, arrays)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), opt.plain[0], **opt.tolerance)


def by_train_state(kind, tx, **extra):
    """(parameters, state) after one step from the start."""
    state = kind.create(apply_fn=None, params=start(), tx=tx)
    state = state.apply_gradients(grads=gradient(start())[0], **extra)
    return state.params, state.opt_state


@every_factory
def test_train_state_passes_the_extra_arguments_on_if_told_how(opt):
    def program():
        _, value = gradient(start())
        ours = by_train_state(flax.TrainState, opt(), **value, **EXTRA)
        return ours, step(opt(), start(), opt().init(start()))

    assert_close(*jit(program)(), **opt.tolerance)


@every_optimizer_with_a_model
def test_train_state_alone_is_refused_with_the_missing_argument(opt):
    """It calls `tx.update(grads, state, params)`."""
    name = opt.reads[0]
    with pytest.raises(ValueError, match=f"needs `{name}`, which was not passed. Pass `{name}="):
        jax.eval_shape(lambda: by_train_state(TrainState, opt()))


@every_optimizer_without_a_model
def test_train_state_alone_serves_where_the_model_is_not_needed(opt):
    def program():
        tx, params = opt(), start()
        updates, state = tx.update(gradient(params)[0], tx.init(params), params)
        return by_train_state(TrainState, tx), (optax.apply_updates(params, updates), state)

    assert_close(*jit(program)(), **opt.tolerance)


@every_optimizer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Orbax's own
def test_orbax_restores_the_state_bit_by_bit(opt, tmp_path):
    params, state = opt.plain
    orbax.save_pytree(tmp_path / "state", state)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        jax.eval_shape(opt().init, params),
    )
    restored = orbax.load_pytree(tmp_path / "state", abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    assert_close(restored, state, **EXACT)
