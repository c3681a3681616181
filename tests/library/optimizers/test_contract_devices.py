"""Every optimizer of ours: several devices give what one gives."""

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
    assert_close,
    every_factory,
    every_optimizer,
    gradient,
    jit,
    logits_fn,
    obj_fn,
    run,
    start,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from flax import linen as nn
    from flax import nnx

pytestmark = pytest.mark.newest


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])


@pytest.fixture
def two_devices():
    mesh = mesh_of(2)
    with jax.set_mesh(mesh):
        yield mesh


@every_factory
@pytest.mark.parametrize("box", ["linen", "nnx"])
def test_boxes_with_names_of_mesh_axes_are_kept_where_the_names_fit(opt, box, two_devices):
    """Flax derives the sharding of a whole state from the boxes, one name for each array axis."""
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
    """Axes are explicit by default, and the user need not do anything about them."""
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
    """Gradient and sample come from outside, since a model would have to name shardings itself."""
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
    """The mean over shards of one sample from each shard's rows, with a key for each shard."""

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
