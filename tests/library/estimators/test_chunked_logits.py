"""`LinearLogits` give the losses, labels and derivatives of whole logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from moments import jit
from tanh_model import KEY, ROWS, D, K, close, shared

from models.layers import tied_logits
from sophia_optax import (
    LinearLogits,
    gauss_newton_bartlett,
    hutchinson,
    softmax_cross_entropy,
    value_grad_and_hessian,
)
from sophia_optax.estimators.chunked_logits import by_chunk

LENGTH, V = 5, 7
rng = np.random.default_rng(1)
LONG = rng.normal(size=(ROWS, LENGTH, D))
Y = rng.integers(V, size=(ROWS, LENGTH))
PARAMS = {
    "w": rng.normal(size=(D, K)),
    "matrix": rng.normal(size=(V, K)),
    "bias": rng.normal(size=V),
}
WEIGHTS = rng.uniform(size=(ROWS, LENGTH)) * (np.arange(LENGTH) < 4)
BATCH = {"x": LONG, "y": Y}


def linear(params, batch, chunk=2):
    features = jnp.tanh(batch["x"] @ params["w"])
    return LinearLogits(features, params["matrix"], params.get("bias"), chunk=chunk)


def whole(params, batch):
    logits = jnp.tanh(batch["x"] @ params["w"]) @ params["matrix"].T
    return logits + params["bias"] if "bias" in params else logits


def loss_fn(logits, batch):
    return softmax_cross_entropy(logits, batch["y"])


def extra_of(logits_fn, inputs=BATCH):
    """Extra arguments of both estimators."""

    def obj_fn(params, batch):
        return jnp.mean(loss_fn(logits_fn(params, batch), batch))

    return {"logits_fn": logits_fn, "loss_fn": loss_fn, "obj_fn": obj_fn, "inputs": inputs}


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("chunk", [1, 2, 8])  # of five positions
@pytest.mark.parametrize("names", [("w", "matrix", "bias"), ("w", "matrix")])
def test_losses_and_two_derivatives_are_those_of_whole_logits(chunk, names):
    with jax.enable_x64(True):
        params = {name: jnp.asarray(PARAMS[name]) for name in names}
        direction = jax.tree.map(lambda p: jnp.cos(7 * p), params)

        def derivatives(logits_fn, losses):
            def loss(params):
                return jnp.sum(WEIGHTS * losses(logits_fn(params, BATCH), Y))

            return jit(
                lambda p: (
                    loss(p),
                    jax.jvp(jax.grad(loss), (p,), (direction,)),
                    jax.hessian(loss)(p)["matrix"]["w"],
                )
            )(params)

        have = derivatives(functools.partial(linear, chunk=chunk), softmax_cross_entropy)
        close(have, derivatives(whole, optax.softmax_cross_entropy_with_integer_labels))


ESTIMATORS = {
    "one group": gauss_newton_bartlett(),
    "groups": gauss_newton_bartlett(groups=4),
    "groups side by side": gauss_newton_bartlett(groups=4, parallel_groups=2),
    "draws of a half in groups": gauss_newton_bartlett(groups=2, num_samples=2, batch_fraction=0.5),
    "hutchinson": hutchinson(groups=2),
    "hutchinson, reverse": hutchinson(mode="reverse", num_samples=2),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_return_what_they_do_with_whole_logits(name):
    """So they draw the same labels, and count the same weights."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, PARAMS)
        have, want = (
            shared(ESTIMATORS[name], params, extra_of(f) | {"weights": WEIGHTS})
            for f in (linear, whole)
        )
        close(have, want)


def test_on_a_mesh_the_matrix_is_one_for_all_shards():
    """The remaining rows are spread over devices as the sampled groups are."""
    spread = {"parallel_groups": 4, "spmd_axis_name": "data"}
    gnb = gauss_newton_bartlett(groups=4, batch_fraction=0.5, **spread)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    params, batch = jax.tree.map(
        lambda x: jnp.float32(x) if x.dtype == float else x, (PARAMS, BATCH)
    )
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    constraint = NamedSharding(mesh, PartitionSpec())

    def constrained(params, batch):
        logits = linear(params, batch)
        features = jax.lax.with_sharding_constraint(logits.features, constraint)
        return LinearLogits(features, logits.matrix, logits.bias, chunk=2)

    def program(logits_fn):
        return jit(lambda p, b: value_grad_and_hessian(gnb)(KEY, p, **extra_of(logits_fn, b)))

    have, want = (program(f)(params, placed) for f in (constrained, whole))
    close(have, want, rtol=1e-4, atol=1e-6)


def test_bfloat16_features_multiply_as_the_models_head_does():
    """The gradient of the matrix is float32, and is summed over chunks in float32."""
    features, matrix = jnp.bfloat16(LONG), jnp.float32(rng.normal(size=(V, D)))

    def losses(matrix):
        return softmax_cross_entropy(LinearLogits(features, matrix, chunk=2), Y)

    want = optax.softmax_cross_entropy_with_integer_labels(tied_logits(features, matrix), Y)
    gradient, have = jit(jax.grad(lambda m: (losses(m).sum(), losses(m)), has_aux=True))(matrix)
    np.testing.assert_allclose(have, want, rtol=1e-6)
    assert gradient.dtype == np.float32
    whole_losses = optax.softmax_cross_entropy_with_integer_labels
    exact = jit(jax.grad(lambda m: whole_losses(features.astype(m.dtype) @ m.T, Y).sum()))(matrix)
    np.testing.assert_allclose(gradient, exact, atol=0.02 * np.abs(exact).max())


# ---------------------------------------------------------------- memory

LARGE = {"B": 4, "T": 64, "D": 8, "V": 512, "chunk": 8}


def largest_float(function, linearly):
    """Elements of the largest float32 array of the compiled program."""
    B, T, D, V, chunk = LARGE.values()
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"w": shape((D, D)), "matrix": shape((V, D))}
    batch = {"x": shape((B, T, D)), "y": jax.ShapeDtypeStruct((B, T), jnp.int32)}
    extra = extra_of(functools.partial(linear, chunk=chunk) if linearly else whole, None)
    text = jit(functools.partial(function, extra)).lower(params, batch).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def sample_of(estimate):
    return lambda extra, params, batch: value_grad_and_hessian(estimate)(
        KEY, params, **extra | {"inputs": batch}
    )


PROGRAMS = {
    "gradient": lambda extra, *at: jax.value_and_grad(extra["obj_fn"])(*at),
    "GNB": sample_of(gauss_newton_bartlett(groups=2, parallel_groups=2)),
    "GNB of a half": sample_of(gauss_newton_bartlett(groups=2, batch_fraction=0.5)),
    "hutchinson": sample_of(hutchinson(num_samples=2)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_whole_logits_are_in_no_program(name):
    """No array is larger than the logits of one chunk of all rows."""
    B, _, _, V, chunk = LARGE.values()
    assert largest_float(PROGRAMS[name], True) <= B * chunk * V


def test_the_program_of_an_array_holds_whole_logits():
    B, T, _, V, _ = LARGE.values()
    assert largest_float(PROGRAMS["gradient"], False) >= B * T * V


# ---------------------------------------------------------------- on a mesh


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_the_matrix_gradient_is_reduced_once(check_vma):
    """It is reduced after the loop over chunks, and H u through the loop is exact."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows, alike = PartitionSpec(("data", "fsdp")), PartitionSpec()
    mapped = jax.shard_map(
        lambda f, m, b, y: softmax_cross_entropy(LinearLogits(f, m, b, chunk=2), y),
        mesh=mesh,
        in_specs=(rows, alike, alike, rows),
        out_specs=rows,
        axis_names={"data", "fsdp"},
        check_vma=check_vma,
    )
    params, x = jax.tree.map(jnp.float32, (PARAMS, LONG))
    direction = jax.tree.map(jnp.cos, params)

    def derivatives(losses):
        def loss(params, x, y):
            features = jnp.tanh(x @ params["w"])
            return jnp.mean(losses(features, params["matrix"], params["bias"], y))

        def second(params, x, y):
            return jax.jvp(lambda p: jax.grad(loss)(p, x, y), (params,), (direction,))

        return jit(jax.grad(loss)), jit(second)

    placed = jax.device_put((x, jnp.asarray(Y)), NamedSharding(mesh, rows))
    gradient, second = derivatives(mapped)
    _, plain = derivatives(
        lambda f, m, b, y: optax.softmax_cross_entropy_with_integer_labels(f @ m.T + b, y)
    )
    close(second(params, *placed), plain(params, x, Y), rtol=1e-4, atol=1e-6)
    text = gradient.lower(params, *placed).compile().as_text()
    body, entry = text.split("\nENTRY ")
    reduced = rf"f32\[{V},{K}\][^\n]*all-reduce\("
    assert "while(" in entry
    assert len(re.findall(reduced, entry)) == 1
    assert "all-reduce(" not in body


def test_in_shard_map_a_sample_is_that_of_whole_logits():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    gnb, whole_specs = gauss_newton_bartlett(groups=2), PartitionSpec()
    params, x = jax.tree.map(jnp.float32, (PARAMS, LONG))

    def sample(logits_fn):
        def of_shard(params, batch):
            extra = extra_of(logits_fn, batch) | {"axis_name": "data"}
            return value_grad_and_hessian(gnb)(KEY, params, **extra)

        specs = (whole_specs, PartitionSpec("data"))
        mapped = jax.shard_map(of_shard, mesh=mesh, in_specs=specs, out_specs=whole_specs)
        return jit(mapped)(params, {"x": x, "y": jnp.asarray(Y)})

    close(sample(linear), sample(whole), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- errors


def refuses(match, function):
    with pytest.raises(ValueError, match=match):
        function()


def test_other_forms_are_refused():
    features, matrix = jnp.ones((2, 3, 4)), jnp.ones((5, 4))
    labels = jnp.zeros((2, 3), int)
    refuses(
        "chunk=0 must be an integer of at least 1", lambda: LinearLogits(features, matrix, chunk=0)
    )
    for factors in ((features, matrix.T), (features[0], matrix), (features, matrix, jnp.ones(4))):
        bad = LinearLogits(*factors)
        where = jnp.zeros(bad.shape[:-1], int)
        refuses("their shapes are", functools.partial(softmax_cross_entropy, bad, where))
    refuses(
        r"`labels` has shape \(2, 2\), but logits of \(2, 3, 5\)",
        lambda: softmax_cross_entropy(LinearLogits(features, matrix), labels[:, :2]),
    )
    for likelihood in ("bernoulli", "gaussian"):
        gnb = gauss_newton_bartlett(likelihood=likelihood)
        refuses(
            "LinearLogits, which serve likelihood 'categorical' only",
            lambda: gnb(KEY, PARAMS, None, **extra_of(linear)),  # noqa: B023
        )
    short = extra_of(lambda params, batch: linear(params, jax.tree.map(lambda x: x[1:], batch)))
    refuses(r"float\[8, ..., V\]", lambda: gauss_newton_bartlett()(KEY, PARAMS, None, **short))


@pytest.mark.parametrize(("length", "chunk", "sizes"), [(10, 4, {4}), (9, 4, {3}), (3, 8, {3})])
def test_a_chunk_is_no_longer_than_asked_for(length, chunk, sizes):
    seen = set()

    def losses(logits):
        seen.add(logits.shape[1])
        return logits.sum(-1)

    by_chunk(losses, LinearLogits(jnp.ones((2, length, 3)), jnp.ones((5, 3)), chunk=chunk))
    assert seen == sizes
