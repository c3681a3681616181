"""A step that samples curvature with sharded parameters: results, collectives and memory."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import models
from models import DecoderConfig
from sophia_optax import gauss_newton_bartlett, value_grad_and_hessian

ROWS, LENGTH = 64, 16
AXES = ("data", "fsdp")
KEY = jax.random.key(3)
MODEL = models.split(DecoderConfig(vocab_size=256, context=LENGTH, width=64, layers=2, heads=2))
PARAMS = jax.tree.map(
    lambda x: x + 0.05 * np.sin(np.arange(x.size)).reshape(x.shape).astype("float32"),
    jax.jit(MODEL.init)(jax.random.key(0)),
)
BATCH = jnp.asarray(np.random.default_rng(0).integers(256, size=(ROWS, LENGTH + 1)))
ALL = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
LARGEST = max(x.nbytes for x in jax.tree.leaves(PARAMS))


def spread(groups, parallel_groups, stride=1, axes=AXES):
    """Settings of an estimator whose parallel groups are spread over mesh axes."""
    settings = {"groups": groups, "parallel_groups": parallel_groups, "spmd_axis_name": axes}
    return settings | ({"batch_fraction": 1 / stride} if stride > 1 else {})


# (settings of the estimator, mesh axes of the rows of one group)
CASES = {
    "one group": ({}, P(AXES)),
    "one group of a quarter": ({"batch_fraction": 0.25}, P(AXES)),
    "a group a device": (spread(8, 8, 4), P()),
    "a group a row": (spread(16, 16, 4), P()),
    "fewer rows than devices": (spread(4, 8, 16), P()),
    "four rounds": (spread(32, 8), P()),
    "a group on four devices": (spread(2, 2, 4, "data"), P("fsdp")),
}


def mesh():
    axes = (*AXES, "tensor")
    return jax.make_mesh((2, 4, 1), axes, axis_types=(AxisType.Auto,) * 3)


def losses(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])


def logits(params, batch, spec=None):
    """Logits with activations sharded as `spec` and a gathered embedding; None for one device."""
    if spec is None:
        return MODEL.apply(params, batch[:, :-1])

    def constrain(x, spec=spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), spec))

    params = params | {"tokens": jax.tree.map(lambda x: constrain(x, P()), params["tokens"])}
    return MODEL.apply(params, batch[:, :-1], constrain)


def plain_step(params, batch, spec=None):
    return jax.value_and_grad(lambda p: losses(logits(p, batch, spec), batch).mean())(params)


def refresh_step(settings, spec):
    """`(params, batch) -> (loss, gradient, h)`."""
    function = value_grad_and_hessian(gauss_newton_bartlett(**settings))
    logits_fn = functools.partial(logits, spec=spec)

    def step(params, batch):
        return function(KEY, params, inputs=batch, logits_fn=logits_fn, loss_fn=losses)

    return step


@functools.cache
def compiled(name):
    """(program compiled for the mesh, its arguments placed on the mesh)."""
    settings, spec = CASES.get(name, ({}, P(AXES)))
    step = functools.partial(plain_step, spec=spec)
    step = step if name == "plain" else refresh_step(settings, spec)
    whole = NamedSharding(mesh(), P())
    of_params = jax.tree.map(
        lambda spec: NamedSharding(mesh(), spec), MODEL.specs, is_leaf=lambda x: isinstance(x, P)
    )
    placed = jax.device_put((PARAMS, BATCH), (of_params, NamedSharding(mesh(), P(AXES))))
    results = (whole, of_params) if name == "plain" else (whole, of_params, of_params)
    return jax.jit(step, out_shardings=results).lower(*placed).compile(), placed


def collectives(name):
    """{collective: bytes of each array it makes}; "in a loop" lists those in loop bodies."""
    text = compiled(name)[0].as_text()
    bodies, made = re.findall(r"body=%?([\w.\-]+)", text), collections.defaultdict(list)
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        inside = re.match(r"%?([\w.\-]*)", computation).group(1) in bodies
        for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", computation):
            sizes = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", result)
            size = [int(b) // 8 * np.prod([int(n) for n in s.split(",") if s]) for b, s in sizes]
            made[kind] += size
            made["in a loop"] += size * inside
    return made


def near(have, want):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())

    jax.tree.map(check, have, want)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if i % 2 else []) for i, n in enumerate(CASES)],
)
def test_eight_devices_return_what_one_does_with_groups_one_by_one(name):
    """The decoder has layer norms: pullbacks under vmap and in a scan agree."""
    program, placed = compiled(name)
    loss, gradient, h = program(*placed)
    near((loss, gradient), jax.jit(plain_step)(PARAMS, BATCH))
    parallel = ("parallel_groups", "spmd_axis_name")
    alone = {n: x for n, x in CASES[name][0].items() if n not in parallel}
    gnb = gauss_newton_bartlett(**alone)
    sample = jax.jit(lambda p, batch: gnb(KEY, p, None, logits_fn=logits, inputs=batch))
    near(h, sample(PARAMS, BATCH))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if i % 2 else []) for i, n in enumerate(CASES)],
)
def test_curvature_moves_what_another_gradient_would(name):
    """No collective makes an array of all parameters, or with an axis of groups, or activations.

    Each pass gathers the parameters once, and reduces its gradient and the sample once.
    """
    plain, refresh, settings = collectives("plain"), collectives(name), CASES[name][0]
    passes = 2 if "batch_fraction" in settings else 1
    for kind, sizes in refresh.items():
        had, has = (sum(made) / ALL for made in (plain[kind], sizes))
        print(f"{name}, {kind}: {has:.2f} parameters, in a plain step {had:.2f}")
    assert max(itertools.chain(*refresh.values())) <= LARGEST < ALL / 2
    assert sum(plain["all-gather"]) >= 0.95 * ALL  # the count sees the parameters
    assert sum(refresh["all-gather"]) <= 1.01 * passes * sum(plain["all-gather"])
    # A group on several devices is reduced over these before it is squared, then over the others.
    assert sum(refresh["all-reduce"]) <= 1.2 * (passes + 1) * sum(plain["all-reduce"])
    moved = ("all-to-all", "collective-permute")
    idle_slots = settings.get("groups", 1) % settings.get("parallel_groups", 1)
    tokens = 2 * BATCH.nbytes if idle_slots else 0
    has, had = (sum(sum(made[kind]) for kind in moved) for made in (refresh, plain))
    assert has <= had + tokens
    assert bool(refresh["in a loop"]) == ("rounds" in name)


@pytest.mark.parametrize("name", CASES)
def test_temporaries_are_not_those_of_a_gradient_for_each_group(name):
    plain, refresh = (compiled(n)[0].memory_analysis().temp_size_in_bytes for n in ("plain", name))
    print(f"{name}: {refresh / ALL:.2f} parameters of temporaries, plain {plain / ALL:.2f}")
    assert refresh < (1.3 if "fewer" in name else 1.25) * plain


def test_a_batch_that_parallel_groups_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="parallel_groups=24 does not divide the 64 rows"):
        jax.eval_shape(refresh_step(spread(4, 24, 16), P()), PARAMS, BATCH)
