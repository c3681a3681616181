"""What every optimizer of ours must bear inside the wrappers of optax, Flax and Orbax."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    EXACT,
    EXTRA,
    NUMBERS,
    OPTIMIZERS,
    PARAMS,
    STEPS,
    X,
    assert_close,
    every_optimizer,
    obj_fn,
    run,
    start,
    step,
    types,
)
from flax import nnx

with warnings.catch_warnings():  # its import warns of its own deprecations
    warnings.simplefilter("ignore")
    import orbax.checkpoint.experimental.v1 as orbax

SAMPLE = {n: np.float32(0.7) + np.abs(x) for n, x in PARAMS.items()}
ONLY_W = {"w": True, "b": False, "s": False}


# ---------------------------------------------------------------- inject_hyperparams


def injected(opt, **changes):
    factory = optax.inject_hyperparams(
        opt.factory, static_args=opt.static, hyperparam_dtype=jnp.float32
    )
    return opt(factory, **changes)


@every_optimizer
def test_injected_schedules_of_every_number_equal_the_numbers(opt):
    tx = injected(opt, **{n: lambda _, x=x: x for n, x in NUMBERS.items()})
    params, state = jax.jit(lambda p: run(tx, p))(start())
    assert set(NUMBERS) <= set(state.hyperparams)
    floats = set(NUMBERS) - {"update_interval"}
    assert all(state.hyperparams[n].dtype == jnp.float32 for n in floats)
    assert_close(params, opt.plain[0], **opt.tolerance)


@pytest.mark.parametrize(("mu_dtype", "kept"), [(None, False), ("bfloat16", True)])
def test_injected_over_bfloat16_parameters_momentum_needs_its_dtype_stated(mu_dtype, kept):
    """Else `optax.ema` turns to the injected float32, as `optax.adamw` does."""
    tx, params = injected(OPTIMIZERS["sophia_h"], mu_dtype=mu_dtype), start("bfloat16")
    state = tx.init(params)
    _, after = jax.eval_shape(lambda p, s: tx.update(p, s, p, **EXTRA), params, state)
    assert (types(after.inner_state) == types(state.inner_state)) == kept


# ---------------------------------------------------------------- MultiSteps


def multi_steps(opt, micro, told):
    """(parameters, state, samples taken) after `STEPS` steps of `micro` micro-steps each."""
    calls = []

    def counted(*args, **extra):
        jax.debug.callback(lambda: calls.append(1))
        return opt.estimator(*args, **extra)

    tx = optax.MultiSteps(opt(estimator=counted), every_k_schedule=micro)

    def body(carry, i):
        params, state = carry
        last = state.mini_step == micro - 1
        due = last & (state.gradient_step % NUMBERS["update_interval"] == 0)
        # The gradients of the micro-batches differ; their mean is that of the batch.
        scale = 1 + (i % micro - (micro - 1) / 2)
        return step(tx, params, state, scale, refresh=due if told else None), None

    def program(params):
        steps = jnp.arange(micro * STEPS)
        return jax.lax.scan(body, (params, tx.init(params)), steps)[0]

    params, state = jax.block_until_ready(jax.jit(program)(start()))
    jax.effects_barrier()
    return params, state, len(calls)


@every_optimizer
def test_multi_steps_told_to_refresh_on_the_last_micro_step_samples_once_per_due_step(opt):
    params, state, calls = multi_steps(opt, micro=3, told=True)
    assert calls == optax.tree.get(state, "accepted") == 4
    assert_close(params, opt.plain[0], **opt.tolerance)


def test_multi_steps_left_to_the_counter_samples_on_every_micro_step_of_a_due_step():
    opt = OPTIMIZERS["sophia_h"]
    params, state, calls = multi_steps(opt, micro=3, told=False)
    assert calls == 3 * 4 and optax.tree.get(state, "accepted") == 4
    assert_close(params, opt.plain[0], **opt.tolerance)


# ---------------------------------------------------------------- masks

WRAPPERS = {
    "masked": lambda tx, **kw: optax.masked(tx, ONLY_W, **kw),
    "partition": lambda tx, **kw: optax.partition(
        {True: tx, False: optax.identity()}, ONLY_W, **kw
    ),
}


def with_sample(tx, params, sample):
    return tx.update(params, tx.init(params), params, hessian=sample, **EXTRA)[0]


@every_optimizer
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_masked_trees_take_a_sample_of_the_whole_tree_from_outside(opt, wrapper):
    tx = WRAPPERS[wrapper](opt(), mask_compatible_extra_args=True)
    updates = with_sample(tx, start(), SAMPLE)
    expected = with_sample(opt(), {"w": start()["w"]}, {"w": SAMPLE["w"]})
    assert_close(updates["w"], expected["w"])
    assert_close(updates["b"], start()["b"], **EXACT)


@every_optimizer
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_masked_trees_without_that_are_refused_with_the_cure(opt, wrapper):
    tx = WRAPPERS[wrapper](opt(), mask_compatible_extra_args=True)
    with pytest.raises(ValueError, match=r"masked params.*pass it: .*hessian=sample"):
        tx.update(start(), tx.init(start()), start(), **EXTRA)
    with pytest.raises(ValueError, match=r"wrapper with `mask_compatible_extra_args=True`"):
        with_sample(WRAPPERS[wrapper](opt()), start(), SAMPLE)


@every_optimizer
def test_an_empty_group_over_a_single_array_is_refused_with_the_cure(opt):
    """There the wrapper masks every extra argument, since each has the structure of params."""
    groups = {"ours": opt(), "other": optax.identity()}
    tx = optax.partition(groups, "other", mask_compatible_extra_args=True)
    x = jnp.ones(3)
    for extra in ({}, {"refresh": jnp.asarray(True)}):
        with pytest.raises((ValueError, TypeError), match=r"single array.*wrap"):
            tx.update(x, tx.init(x), x, **extra, **EXTRA)


@every_optimizer
def test_frozen_leaves_stay_and_the_others_move_as_without(opt):
    freeze = {n: n == "w" for n in PARAMS}
    updates = with_sample(optax.chain(opt(), optax.transforms.freeze(freeze)), start(), SAMPLE)
    expected = with_sample(opt(), start(), SAMPLE)
    assert not updates["w"].any()
    assert_close(updates["b"], expected["b"])


@every_optimizer
def test_selective_transform_is_refused_with_the_cure(opt):
    """It makes its partition itself, and does not mask extra arguments alike."""
    tx = optax.transforms.selective_transform(opt(), freeze_mask={n: n == "w" for n in PARAMS})
    with pytest.raises(ValueError, match="masked params"):
        tx.update(start(), tx.init(start()), start(), **EXTRA)
    with pytest.raises(ValueError, match=r"wrapper with `mask_compatible_extra_args=True`"):
        with_sample(tx, start(), SAMPLE)


# ---------------------------------------------------------------- the others


@every_optimizer
def test_apply_if_finite_skips_a_bad_gradient_and_nothing_else(opt):
    tx = optax.apply_if_finite(opt(), max_consecutive_errors=2)

    def program(params):
        scales = jnp.ones(STEPS + 1).at[4].set(jnp.nan)
        carry = (params, tx.init(params))
        return jax.lax.scan(lambda c, scale: (step(tx, *c, scale), None), carry, scales)[0]

    params, state = jax.jit(program)(start())
    assert state.total_notfinite == 1 and optax.tree.get(state, "accepted") == 4
    assert_close(params, opt.plain[0], **opt.tolerance)


@every_optimizer
def test_flax_optimizer_passes_the_extra_arguments_on(opt):
    class Model(nnx.Module):
        def __init__(self):
            self.w, self.b, self.s = (nnx.Param(start()[n]) for n in "wbs")

    @nnx.jit
    def train(model, optimizer):
        params = nnx.state(model, nnx.Param)
        grads = jax.grad(lambda p: obj_fn(nnx.to_pure_dict(p), X))(params)
        optimizer.update(model, grads, **EXTRA)

    model = Model()
    optimizer = nnx.Optimizer(model, opt(), wrt=nnx.Param)
    for _ in range(STEPS):
        train(model, optimizer)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), opt.plain[0], **opt.tolerance)


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
    assert types(restored) == types(state)
    assert_close(restored, state, **EXACT)
