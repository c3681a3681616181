"""Loss, gradient and sample are the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import ExactTanh
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from moments import jit
from tanh_model import KEY, PARAMS, W, X, Y, arguments, close, logits_fn, loss_fn, obj_fn

from sophia_optax import gauss_newton_bartlett, hutchinson
from sophia_optax.estimators.value_and_grad import value_grad_and_hessian

ON_MESHES = {
    "one group": gauss_newton_bartlett(),
    "groups": gauss_newton_bartlett(groups=8, parallel_groups=8),
    "groups of a half": gauss_newton_bartlett(groups=8, parallel_groups=8, batch_fraction=0.5),
    "hutchinson": hutchinson(),
}
TWICE = np.concatenate([X, X[::-1]])
TWICE_Y = np.concatenate([Y["categorical"], Y["categorical"][::-1]])
TWICE_W = np.concatenate([W, W[::-1]])


def mesh_of(shape):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def twice(weighted):
    """(params, batch) of 16 rows."""
    batch = {"x": jnp.asarray(TWICE, jnp.float32), "y": jnp.asarray(TWICE_Y)}
    batch |= {"w": jnp.asarray(TWICE_W, jnp.float32)} if weighted else {}
    return arguments(dtype="float32")[0], batch


def call(estimate, **more):
    """`(params, batch) -> (loss, gradient, h)`."""

    def function(params, batch):
        extra = {"obj_fn": obj_fn, "logits_fn": logits_fn, "loss_fn": loss_fn, "inputs": batch}
        weights = batch.get("w")
        return value_grad_and_hessian(estimate)(KEY, params, weights=weights, **extra, **more)

    return function


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
@pytest.mark.parametrize("name", ON_MESHES)
def test_eight_devices_return_what_one_does(name, shape):
    split, whole = (NamedSharding(mesh_of(shape), PartitionSpec(*n)) for n in (["data"], []))
    placed = jax.device_put(twice(True), (whole, split))
    assert len(placed[1]["x"].sharding.device_set) == 8
    function = jit(call(ON_MESHES[name]))
    close(function(*placed), function(*twice(True)), rtol=1e-5, atol=1e-6)
    if shape == (8, 1):
        compiled = function.lower(*placed).compile().as_text()
        assert "all-reduce" in compiled
        for collective in ("all-gather", "all-to-all", "collective-permute"):
            assert collective not in compiled, "rows stay where they are"


@pytest.mark.parametrize(
    ("estimate", "weighted", "check_vma"),
    [
        (gauss_newton_bartlett(groups=2, num_samples=2), True, True),
        (gauss_newton_bartlett(groups=2, num_samples=2), True, False),
        (gauss_newton_bartlett(), True, True),
        (gauss_newton_bartlett(), False, True),
        (hutchinson(), False, True),
        (hutchinson(), False, False),
        (hutchinson(mode="reverse", num_samples=2), False, True),
        (gauss_newton_bartlett(batch_fraction=0.5), True, True),
        (hutchinson(batch_fraction=0.5), False, True),
    ],
)
def test_in_shard_map_loss_and_gradient_are_those_of_all_shards(estimate, weighted, check_vma):
    def of_shard(params, batch):
        extra = {"obj_fn": obj_fn, "logits_fn": logits_fn, "inputs": batch}
        weights = batch.get("w")
        sample = estimate(KEY, params, None, axis_name="data", weights=weights, **extra)
        return call(estimate, axis_name="data")(params, batch), sample

    whole, split = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
        of_shard,
        mesh=mesh_of((8, 1)),
        in_specs=(whole, split),
        out_specs=whole,
        check_vma=check_vma,
    )
    (loss, gradient, h), sample = jit(mapped)(*twice(weighted))
    exact = ExactTanh("categorical", TWICE, TWICE_W if weighted else None)
    close(loss, exact.loss(PARAMS, TWICE_Y), rtol=1e-5)
    close(gradient, exact.gradient(PARAMS, TWICE_Y), rtol=1e-5, atol=1e-6)
    close(h, sample, rtol=1e-5, atol=1e-6)
