"""What every optimizer of ours must bear, by itself: one table, optimizers by rows."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    BATCH,
    EXTRA,
    STEPS,
    accepted,
    all_finite,
    assert_close,
    every_factory,
    every_optimizer,
    gradient,
    jit,
    logits_fn,
    obj_fn,
    run,
    start,
    step,
    types,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from flax import linen as nn
    from flax import nnx
pytestmark = pytest.mark.newest


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])


@every_optimizer
def test_every_number_that_the_signature_declares_is_listed(opt):
    """As one to trace, or among `arguments`, where it must be known or has no use."""
    assert opt.traceable - set(opt.arguments) == set(opt.numbers)


@every_optimizer
def test_every_number_may_be_traced_and_changes_where_it_leads(opt):
    """One lane as listed, and one for each number in which that is another."""
    listed = opt.numbers | {"learning_rate": 0.1}
    another = {n: x + 1 if isinstance(x, int) else 0.7 * x for n, x in listed.items()}
    lanes = [listed, *(listed | {n: x} for n, x in another.items())]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *lanes)
    params, _ = jit(jax.vmap(lambda numbers: run(opt(**numbers), start())))(stacked)
    moved = jnp.abs(params["w"][1:] - params["w"][0]).max((1, 2))
    assert dict(zip(another, moved > 1e-5, strict=True)) == dict.fromkeys(another, True)


# ---------------------------------------------------------------- dtypes


@every_optimizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed", "float64"])
def test_updates_and_state_keep_their_dtypes(opt, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx, params = opt(), start(dtype)
        state = tx.init(params)
        update = functools.partial(tx.update, value=1.0, **EXTRA)
        updates, after = jax.eval_shape(lambda p, s: update(p, s, p), params, state)
    assert types(updates) == types(params) and types(after) == types(state)
    wide = [x for x in jax.tree.leaves(state) if x.dtype == "float64"]
    assert bool(wide) == (dtype == "float64")


@every_optimizer
@pytest.mark.parametrize("dtype", ["float16", "mixed"])
def test_all_is_finite_where_float16_has_no_eps_and_coordinates_are_dead(opt, dtype):
    """Dead: without gradient, and so without curvature and momentum."""
    tx, params = opt(eps=1e-12), start(dtype)
    grads, value = jit(gradient)(params)
    assert not grads["w"][0].any()

    def update(grads, state):
        return tx.update(grads, state, params, refresh=True, **value, **EXTRA)

    updates, state = jit(update)(grads, tx.init(params))
    assert all_finite((updates, state)) and set(accepted(state)) <= {1}


@every_optimizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_our_own_code_promotes_no_dtype_by_itself(opt, dtype, monkeypatch):
    """Under strict promotion, of which only optax's own links are relieved."""

    def relieved(link):
        @functools.wraps(link)
        def make(*args, **kwargs):
            tx = link(*args, **kwargs)
            update = jax.numpy_dtype_promotion("standard")(tx.update)
            return optax.GradientTransformation(tx.init, update)

        return make

    for link in ("ema", "add_decayed_weights", "scale_by_learning_rate"):
        monkeypatch.setattr(optax, link, relieved(getattr(optax, link)))
    with jax.numpy_dtype_promotion("strict"):
        tx, params = opt(learning_rate=0.1), start(dtype)
        jax.eval_shape(lambda p, s: step(tx, p, s), params, tx.init(params))


@every_optimizer
def test_no_rank_is_promoted(opt):
    """Under `jax_numpy_rank_promotion="raise"`, which some projects test under."""

    def logits_fn(params, batch):
        logits = params["s"] * (batch["x"] @ params["w"])
        return logits + jnp.broadcast_to(params["b"], logits.shape)

    def obj_fn(params, batch):
        logits = logits_fn(params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    batch = jax.tree.map(jnp.asarray, BATCH)
    extra = {"obj_fn": obj_fn, "logits_fn": logits_fn, "inputs": batch, "value": 1.0}
    tx, params = opt(learning_rate=0.1), start()
    with jax.numpy_rank_promotion("raise"):
        updates, _ = jax.eval_shape(
            lambda p, s: tx.update(p, s, p, **extra), params, tx.init(params)
        )
    assert types(updates) == types(params)


@every_factory
def test_debug_nans_finds_none(opt):
    """No NaN on the way either, at a refresh, between two, and where coordinates are dead."""
    tx, params = opt(learning_rate=0.1), start()
    with jax.debug_nans(True):
        state, program = tx.init(params), jit(functools.partial(step, tx))
        for _ in range(2):
            params, state = program(params, state)
    assert all_finite((params, state))


# ---------------------------------------------------------------- leaves of other kinds


@every_optimizer
@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
def test_leaves_that_are_no_real_numbers_are_refused_by_name(opt, dtype):
    params = start() | {"odd": jnp.ones(2, dtype)}
    with pytest.raises(ValueError, match=rf"params\['odd'\] is {dtype}"):
        opt().init(params)


@every_factory
def test_a_number_of_python_is_a_parameter(opt):
    tx, x = opt(), 0.5
    extra = classifier(lambda p, x: jnp.concatenate([p * x, 1 - x], 1))
    grads = {"x": jnp.asarray(0.1)}
    extra = {n: f if n in ("inputs", "value") else _of_x(f) for n, f in extra.items()}
    updates = [
        tx.update(grads, tx.init(p), p, refresh=True, **extra)[0]["x"]
        for p in ({"x": x}, {"x": jnp.asarray(x)})
    ]
    np.testing.assert_allclose(*updates, rtol=1e-6)
    assert updates[0] < 0


def _of_x(function):
    return lambda params, inputs: function(params["x"], inputs)


@every_factory
def test_none_in_the_gradient_is_none_in_the_update(opt):
    """As `optax.adamw` has it; the others move as if the gradient there were 0."""
    tx, params = opt(learning_rate=0.1), start()
    extra = {"value": 1.0, **EXTRA}
    grads = gradient(params)[0]
    nothing = grads | {"b": jnp.zeros_like(grads["b"])}

    def update(grads):
        return tx.update(grads, tx.init(params), params, **extra)

    updates, state = jit(update)(grads | {"b": None})
    expected, expected_state = jit(update)(nothing)
    assert updates.pop("b") is None and expected.pop("b") is not None
    assert_close(updates, expected, **opt.tolerance)
    assert_close(state, expected_state, **opt.tolerance)


@pytest.fixture
def two_devices():
    mesh = mesh_of(2)
    with jax.set_mesh(mesh):
        yield mesh


@every_factory
@pytest.mark.parametrize("box", ["linen", "nnx"])
def test_boxes_with_names_of_mesh_axes_are_kept_where_the_names_fit(opt, box, two_devices):
    """Flax finds the sharding of a whole state by them: a name for each axis of the array."""
    names = {"w": ("data", None), "b": (None,), "s": ()}

    def boxed(x, names):
        if box == "linen":
            return nn.Partitioned(x, names)
        sharding = NamedSharding(two_devices, PartitionSpec(*names))
        return nnx.Param(jax.device_put(x, sharding), out_sharding=names)

    tx, params = opt(learning_rate=0.1), start()
    in_boxes = {n: boxed(x, names[n]) for n, x in params.items()}
    state = tx.init(in_boxes)
    kinds = (nn.Partitioned, nnx.Variable)
    for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(leaf, kinds):
            held = leaf.names if box == "linen" else leaf.get_metadata("out_sharding")
            assert len(held) == jax.tree.leaves(leaf)[0].ndim
    grads = {n: boxed(x, names[n]) for n, x in gradient(params)[0].items()}

    def unboxed(function):
        return lambda boxes, batch: function(
            {n: jax.tree.leaves(x)[0] for n, x in boxes.items()}, batch
        )

    model = {n: unboxed(EXTRA[n]) for n in ("obj_fn", "logits_fn")}

    def update(grads, params, model):
        return tx.update(grads, tx.init(params), params, value=1.0, **(EXTRA | model))[0]

    updates = jit(functools.partial(update, model=model))(grads, in_boxes)
    expected = jit(functools.partial(update, model={}))(gradient(params)[0], params)
    assert_close(jax.tree.leaves(updates), jax.tree.leaves(expected), **opt.tolerance)


@every_optimizer
def test_a_short_gradient_does_not_cut_the_step_of_a_wide_parameter(opt):
    """Without decay, which would widen what was cut before."""
    tx, params = opt(weight_decay=0.0), start()
    grads = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    updates, _ = jax.eval_shape(
        lambda g, s, p: tx.update(g, s, p, value=1.0, **EXTRA), grads, tx.init(params), params
    )
    assert types(updates) == types(params)


# ---------------------------------------------------------------- transformations of jax


@every_optimizer
def test_scan_carries_parameters_and_state_and_it_descends(opt):
    params, state = opt.plain
    assert types(params) == types(start()) and types(state) == types(opt().init(start()))
    assert all_finite((params, state))
    assert obj_fn(params, BATCH) < 0.5 * obj_fn(start(), BATCH)


@every_optimizer
@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_cond_carries_parameters_and_state(opt, dtype):
    tx, params = opt(), start(dtype)

    def maybe(pred, params, state):
        return jax.lax.cond(pred, lambda *c: step(tx, *c), lambda *c: c, params, state)

    carry = (params, tx.init(params))
    assert types(jax.eval_shape(maybe, True, *carry)) == types(carry)


@every_optimizer
def test_donated_state_compiles_once_under_a_schedule_and_inits_again(opt):
    traces, tx = [], opt()

    @functools.partial(jit, donate_argnums=(0, 1))
    def donated(params, state):
        traces.append(1)
        return step(tx, params, state)

    for init in (tx.init, jax.jit(tx.init)):
        params = start()
        state = init(params)
        for _ in range(STEPS):
            params, state = donated(params, state)
        assert_close((params, state), opt.plain, **opt.tolerance)
    assert len(traces) == 1


@every_optimizer
def test_it_reads_the_extra_arguments_listed_and_ignores_all_others(opt):
    tx, params = opt(), start()
    needed = {n: x for n, x in EXTRA.items() if n in opt.reads}

    def program(**extra):
        return str(jax.make_jaxpr(lambda s: tx.update(params, s, params, **extra))(tx.init(params)))

    plain = program(**needed)
    assert program(**EXTRA, unknown=object()) == plain
    for name, x in {"hessian": params, "refresh": True, "value": 2.0}.items():
        assert (program(**needed, **{name: x}) != plain) == (name in opt.reads)


@every_optimizer
def test_vmap_is_one_run_for_each_seed_and_state(opt):
    """The last lane goes on from another count: of the lanes, `lax.cond` refreshes some."""
    first = (start(), opt().init(start()))

    def one(seed, params, state):
        return run(opt(seed=seed) if "seed" in opt.parameters else opt(), params, state)

    lanes = jax.tree.map(lambda *x: jnp.stack(x), first, first, opt.plain)
    runs = jit(jax.vmap(one))(jnp.array([0, 5, 0]), *lanes)
    same, other, later = (jax.tree.map(lambda x: x[i], runs) for i in range(3))  # noqa: B023
    assert_close(same, opt.plain, **opt.tolerance)
    assert_close(later, opt.program(*opt.plain), **opt.tolerance)
    if opt.model:
        assert not np.allclose(same[0]["w"], other[0]["w"])


@every_optimizer
def test_eval_shape_of_init_is_init(opt):
    tx = opt()
    assert types(jax.eval_shape(tx.init, start())) == types(tx.init(start()))


# ---------------------------------------------------------------- several devices


@every_optimizer
def test_eight_devices_equal_one(opt):
    P, mesh = PartitionSpec, mesh_of(8)
    specs = {"w": P("data"), "b": P(), "s": P()}
    shard = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    program = jit(lambda params, batch: run(opt(), params, inputs=batch))
    params, state = program(jax.device_put(start(), shard), batch)
    assert len(params["w"].sharding.device_set) == 8
    assert_close((params, state), opt.plain, **opt.tolerance)


@every_factory
@pytest.mark.parametrize("named", [True, False], ids=["jax.set_mesh", "by the arrays"])
def test_eight_devices_of_explicit_axes_equal_one(opt, named):
    """Axes are explicit by default; nothing is asked of the user."""
    P, mesh = PartitionSpec, mesh_of(8, AxisType.Explicit)
    params = jax.device_put(start(), NamedSharding(mesh, P()))
    batch = BATCH | {"y": np.eye(3, dtype=np.float32)[BATCH["y"]]}
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))

    def loss(params, batch):  # JAX 0.12 finds no mesh for integer labels where none is set
        return optax.softmax_cross_entropy(logits_fn(params, batch), batch["y"]).mean()

    model = {"objective": loss, "obj_fn": loss}
    program = jit(lambda params, batch: run(opt(), params, inputs=batch, **model))
    with jax.set_mesh(mesh) if named else contextlib.nullcontext():
        params, state = program(params, batch)
    assert len(params["w"].sharding.device_set) == 8
    assert_close((params, state), opt.plain, **opt.tolerance)


@every_factory
def test_parameters_sharded_over_explicit_axes_equal_one_device(opt):
    """Where the gradient and the sample come from outside: a model would name shardings itself."""
    P, mesh = PartitionSpec, mesh_of(2, AxisType.Explicit)
    specs = {"w": P("data"), "b": P(), "s": P()}
    placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in start().items()}
    grads = gradient(start())[0]
    sample = jax.tree.map(jnp.square, grads)

    def program(tx, params, grads, sample):
        state = tx.init(params)
        for due in (True, False):
            extra = {"hessian": sample if due else None, "refresh": due, "value": 1.0}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
        return params

    program = jit(functools.partial(program, opt(learning_rate=0.1)))
    alike = lambda tree: jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, placed)  # noqa: E731
    sharded = program(placed, alike(grads), alike(sample))
    assert sharded["w"].sharding.spec[0] == "data"
    assert_close(sharded, program(start(), grads, sample), **opt.tolerance)


def shard_by_shard(estimator, shards):
    """The mean over shards of what each samples from its own rows, with a key of its own."""

    def whole(key, params, updates, *, inputs, **extra):
        cut = jax.tree.map(lambda x: jnp.reshape(x, (shards, -1, *x.shape[1:])), inputs)

        def sample(shard, rows):
            key_of_shard = jax.random.fold_in(key, shard)
            return estimator(key_of_shard, params, updates, **(extra | {"inputs": rows}))

        samples = jax.vmap(sample)(jnp.arange(shards), cut)
        return jax.tree.map(lambda h: jnp.mean(h, 0), samples)

    return whole


@every_optimizer
def test_shard_map_of_batches_equals_the_whole_batch(opt):
    """The caller averages the gradient and the loss; `axis_name` averages the samples."""
    tx = opt(axis_name="data") if opt.model else opt()

    def averaged(params, batch):
        return jax.lax.pmean(obj_fn(params, batch), "data")

    def program(params, batch):
        return run(tx, params, inputs=batch, objective=averaged)

    P, mesh = PartitionSpec, mesh_of(4)
    sharded = jax.shard_map(program, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    expected = opt.plain
    if "logits_fn" in opt.reads:  # labels are drawn by shards; probes are the same on all
        by_hand = opt(estimator=shard_by_shard(opt.model, 4))
        expected = jit(lambda params: run(by_hand, params))(start())
    assert_close(jit(sharded)(start(), BATCH), expected, **opt.tolerance)


# ---------------------------------------------------------------- trees


@every_optimizer
def test_map_params_finds_every_moment(opt):
    tx, names = opt(), {"w": "w", "b": "b", "s": "s"}
    mapped = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(start()), names, transform_non_params=lambda _: "-"
    )
    found = [name for name in jax.tree.leaves(mapped) if name != "-"]
    paths = [path for path, _ in jax.tree.leaves_with_path(tx.init(start()))]
    expected = [path[-1].key for path in paths if isinstance(path[-1], jax.tree_util.DictKey)]
    assert sorted(found) == sorted(expected) and set(found) == set(names)


@every_optimizer
def test_none_leaves_are_left_alone(opt):
    tx, params = opt(), start() | {"none": None}
    state = tx.init(params)
    updates, after = jax.eval_shape(lambda p, s: tx.update(p, s, p, **EXTRA), params, state)
    assert types(updates) == types(params) and types(after) == types(state)


def classifier(logits):
    """The extra arguments of a model of two classes, all of one label."""

    def loss(params, inputs):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, inputs), jnp.zeros(4, int)
        )
        return losses.mean()

    return {"inputs": jnp.ones((4, 1)), "logits_fn": logits, "obj_fn": loss, "value": 1.0}


@every_optimizer
def test_a_scalar_is_a_tree(opt):
    tx, x = opt(), jnp.asarray(0.5)
    extra = classifier(lambda p, x: jnp.concatenate([p * x, 1 - x], 1))
    update = jit(lambda x, state: tx.update(x, state, x, refresh=True, **extra))
    updates, state = update(x, tx.init(x))
    assert types(updates) == types(x) and all_finite((updates, state))
    assert updates < 0 and set(accepted(state)) <= {1}


@every_optimizer
def test_an_empty_tree_is_a_tree(opt):
    tx, extra = opt(), classifier(lambda p, x: jnp.concatenate([x, 1 - x], 1))
    state = tx.init({})
    updates, after = jax.eval_shape(lambda s: tx.update({}, s, {}, **extra), state)
    assert updates == {} and types(after) == types(state)
