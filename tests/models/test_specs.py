"""Sharding specs of a decoder's parameters, and initial values that are made in place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from test_decoder import CONFIG

from models import split


def test_specs_of_every_parameter():
    model = split(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(model.specs) == jax.tree.structure(shapes)
    into, out = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
    expected = dict.fromkeys(["query", "key", "value", "up"], into)
    expected |= dict.fromkeys(["out", "down", "embedding"], out) | {"scale": PartitionSpec()}
    for path, spec in jax.tree.leaves_with_path(model.specs):
        positions = path[0].key == "positions"
        assert spec == (PartitionSpec(None, "fsdp") if positions else expected[path[-1].key]), path


def test_specs_and_shapes_draw_no_number(monkeypatch):
    normal, drawn = nnx.initializers.normal, []

    def recording(stddev):
        def initializer(key, shape, dtype):
            drawn.append(isinstance(key, jax.core.Tracer))
            return normal(stddev)(key, shape, dtype)

        return initializer

    monkeypatch.setattr(nnx.initializers, "normal", recording)
    jax.eval_shape(split(CONFIG).init, jax.random.key(0))
    assert drawn and all(drawn)


def test_init_runs_in_place_on_a_mesh_and_without_one():
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=axes)
    model = split(dataclasses.replace(CONFIG, layers=1))
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), model.specs)
    placed = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding.spec, placed) == model.specs
    plain = model.init(jax.random.key(0))
    assert type(plain) is dict
    for one, other in zip(jax.tree.leaves(placed), jax.tree.leaves(plain), strict=True):
        assert type(other) is type(jnp.ones(1)) and other.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)
