"""The optimizers that must keep the contract, and the small model that they are run on.

An optimizer joins `test_contract*.py` and `test_wrappers.py` by a line in `OPTIMIZERS`.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sophia_optax import (
    clip_by_ratio,
    floor,
    gauss_newton_bartlett,
    hessian_estimate,
    hutchinson,
    orthosoph,
    rms_floor,
    second_moment,
    soaa,
    sophia_g,
    sophia_geometric,
    sophia_h,
    sophia_lite,
    trust_region,
)
from train.parallel import xla_flags

ArrayLike = jax.typing.ArrayLike
# Compilation dominates the run time of the contract; XLA's defaults take 3 to 4 times as long.
FAST = ("xla_cpu_use_fusion_emitters", "xla_cpu_parallel_codegen_split_count")
OPTIONS = xla_flags.known({name: xla_flags.QUICK[name] for name in FAST})
jit = functools.partial(jax.jit, compiler_options=OPTIONS)

# ---------------------------------------------------------------- the optimizers


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """A factory of ours and how it is called."""

    factory: Callable[..., Any]
    numbers: dict[str, Any]  # the arguments that are traced
    reads: tuple[str, ...]  # the extra arguments of `update`
    model: Any = None  # the estimator, if it needs the model: it then refuses masked trees
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # the others

    def __call__(self, factory=None, **changes):
        estimator = {"estimator": self.model} if self.model else {}
        return (factory or self.factory)(**(self.numbers | self.arguments | estimator | changes))

    @functools.cached_property
    def parameters(self):
        return inspect.signature(self.factory).parameters

    @functools.cached_property
    def traceable(self) -> set[str]:
        """Arguments that the signature declares as a number, or as a schedule of one."""
        numeric = {n for n, p in self.parameters.items() if float in typing.get_args(p.annotation)}
        return numeric - {"seed", "b2_numbers"}  # b2_numbers is a deprecated name

    @functools.cached_property
    def tolerance(self) -> dict[str, float]:
        """Programs may round differently: bfloat16 turns one last bit into 2^-8 of a step."""
        if any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(self.plain[1])):
            return {"rtol": 2e-2, "atol": 2e-2}
        return {"rtol": 1e-5, "atol": 1e-6}

    @functools.cached_property
    def program(self):
        """`(parameters, state) -> (parameters, state)` after `STEPS` more steps."""
        return jit(functools.partial(run, self()))

    @functools.cached_property
    def plain(self):
        """(parameters, state) after `STEPS` steps in float32, which wrapped runs must equal."""
        return self.program(start(), self().init(start()))


def sophia_in_a_region(
    learning_rate: optax.ScalarOrSchedule,
    total_steps: ArrayLike,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    weight_decay: ArrayLike,
    gamma: ArrayLike,
    width: ArrayLike,
    clip_threshold: ArrayLike,
    update_interval: ArrayLike,
    estimator: Any,
    seed: ArrayLike = 0,
    axis_name: str | None = None,
):
    """Sophia's direction inside a trust region."""
    ratio = clip_by_ratio(
        optax.ema(b1, debias=True, accumulator_dtype=None),
        hessian_estimate(
            estimator, decay=b2, update_interval=update_interval, seed=seed, axis_name=axis_name
        ),
        denominator=floor(gamma, eps),
        clip_threshold=clip_threshold,
    )
    return optax.chain(
        trust_region(ratio, learning_rate, total_steps=total_steps, b1=b1, eps=eps, gamma=width),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def sophia_over_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike,
    b2: ArrayLike,
    b3: ArrayLike,
    eps: ArrayLike,
    weight_decay: ArrayLike,
    gamma: ArrayLike,
    update_interval: ArrayLike,
    estimator: Any,
    seed: ArrayLike = 0,
    axis_name: str | None = None,
):
    """Sophia where curvature is large, Adam where it is small."""
    ratio = clip_by_ratio(
        optax.ema(b1, debias=True, accumulator_dtype=None),
        hessian_estimate(
            estimator, decay=b2, update_interval=update_interval, seed=seed, axis_name=axis_name
        ),
        denominator=rms_floor(gamma, eps),
        second_moment=second_moment(b3),
        clip_threshold=None,
    )
    return optax.chain(
        ratio, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )


STEPS = 10
MOMENTUM = {
    "learning_rate": optax.cosine_decay_schedule(0.1, 2 * STEPS),
    "b1": 0.9,
    "eps": 1e-3,
    "weight_decay": 0.1,
}
ADAM = MOMENTUM | {"b2": 0.8}
SOPHIA = ADAM | {"eps": 0.1, "gamma": 3.0, "clip_threshold": 0.8, "update_interval": 3}
REGION = SOPHIA | {"total_steps": 2 * STEPS, "width": 0.25}
OVER_ADAM = ADAM | {"b3": 0.7, "gamma": 3.0, "update_interval": 3}
LITE = ADAM | {"clip_threshold": 1.0, "update_interval": 1}
LITE_3 = LITE | {"update_interval": 3}
GEOMETRIC = ADAM | {"clip_threshold": 5.0, "rho": 0.7, "max_norm": 0.5}
SOAA = ADAM | {"total_steps": 2 * STEPS, "gamma": 0.25}
ROWS = MOMENTUM | {"rms": 0.3, "b2_vector": 0.7}
ROWS_KEPT = ROWS | ADAM | {"update_interval": 3}
TILES = ADAM | {"rms": 0.3, "update_interval": 3}

SAMPLES = ("hessian", "refresh")
H = ("obj_fn", "inputs", *SAMPLES)
G = ("logits_fn", "inputs", *SAMPLES)
GNB, GROUPS = gauss_newton_bartlett(), gauss_newton_bartlett(groups=2)

SHORT = {"mu_dtype": "bfloat16", "hessian_dtype": "bfloat16"}
SHORT_H = {"mu_dtype": "float32", "hessian_dtype": "bfloat16", "statistics": True}
RAW_H = {"debias_hessian": False, "statistics": False}
RAW = {"debias_momentum": False, "debias_hessian": False}
TADAM = {"rule": "tadam"}
ROWS_OF_2 = {"block_size": 2}
LEAST_STATE = ROWS_OF_2 | {"b2": 0.0, "update_interval": 1}
TILES_OF_2 = {"block_size": 2, "form": "tiles", "b2_vector": 0.0, "mu_dtype": None}

OPTIMIZERS = {
    # curvature sampled from the model
    "sophia_h": Optimizer(sophia_h, SOPHIA, H, hutchinson()),
    "sophia_g, raw h": Optimizer(sophia_g, SOPHIA, G, GNB, RAW_H),
    "sophia_g, groups, bfloat16": Optimizer(sophia_g, SOPHIA, G, GROUPS, SHORT),
    "sophia in a region": Optimizer(sophia_in_a_region, REGION, (*H, "value"), hutchinson()),
    "sophia over adam": Optimizer(sophia_over_adam, OVER_ADAM, G, GNB),
    # curvature made of the gradient
    "sophia_lite": Optimizer(sophia_lite, LITE, SAMPLES),
    "sophia_lite, raw, bfloat16": Optimizer(sophia_lite, LITE_3, SAMPLES, None, RAW | SHORT),
    "sophia_geometric": Optimizer(sophia_geometric, GEOMETRIC, SAMPLES),
    "sophia_geometric, bfloat16 h": Optimizer(sophia_geometric, GEOMETRIC, SAMPLES, None, SHORT_H),
    # moments
    "soaa": Optimizer(soaa, SOAA, ("value",)),
    "soaa, tadam": Optimizer(soaa, SOAA, ("value",), None, TADAM),
    "soaa, tadam, bfloat16": Optimizer(soaa, SOAA, ("value",), None, TADAM | SHORT),
    "orthosoph": Optimizer(orthosoph, ROWS, (), None, LEAST_STATE),
    "orthosoph, state kept": Optimizer(orthosoph, ROWS_KEPT, ("refresh",), None, ROWS_OF_2),
    "orthosoph, tiles": Optimizer(orthosoph, TILES, ("refresh",), None, TILES_OF_2),
}


# Each shares its factory, estimator and extra arguments with another row.
VARIANTS = {
    "sophia_g, raw h",
    "sophia_lite, raw, bfloat16",
    "sophia_geometric, bfloat16 h",
    "soaa",
    "soaa, tadam, bfloat16",
    "orthosoph",
    "orthosoph, tiles",
}


def parametrized(optimizers, slow=frozenset()):
    rows = [
        pytest.param(opt, id=name, marks=[pytest.mark.slow] if name in slow else [])
        for name, opt in optimizers.items()
    ]
    return pytest.mark.parametrize("opt", rows)


every_optimizer = parametrized(OPTIMIZERS)
every_factory = parametrized(OPTIMIZERS, slow=VARIANTS)  # the variants by `pytest -m slow`
every_optimizer_with_a_model = parametrized({n: o for n, o in OPTIMIZERS.items() if o.model})
every_optimizer_without_a_model = parametrized({n: o for n, o in OPTIMIZERS.items() if not o.model})

# ---------------------------------------------------------------- the model

BATCH_SIZE, D, V = 8, 8, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(BATCH_SIZE, D)) * (np.arange(D) > 0)  # a feature that is dead
BATCH = {"x": X.astype(np.float32), "y": rng.integers(V, size=BATCH_SIZE)}
PARAMS = {
    "w": rng.normal(size=(D, V)).astype(np.float32),
    "b": np.zeros(V, np.float32),
    "s": np.ones((), np.float32),
}
MIXED = {"w": "bfloat16", "b": "float32", "s": "float16"}
EXACT = {"rtol": 0, "atol": 0}


def start(dtype="float32"):
    dtypes = MIXED if dtype == "mixed" else dict.fromkeys(PARAMS, dtype)
    return {n: jnp.asarray(x, dtypes[n]) for n, x in PARAMS.items()}


def logits_fn(params, batch):
    params = jax.tree.map(lambda x: x.astype(np.promote_types(x.dtype, "float32")), params)
    return params["s"] * (batch["x"] @ params["w"]) + params["b"]


def obj_fn(params, batch):
    logits = logits_fn(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch["y"])).mean()


EXTRA = {"obj_fn": obj_fn, "logits_fn": logits_fn, "inputs": BATCH}


def gradient(params, batch=BATCH, objective=obj_fn):
    """What the caller passes to `update`: the gradient, and the loss as `value`."""
    value, grads = jax.value_and_grad(objective)(params, batch)
    return grads, {"value": value}


def step(tx, params, state, scale=1.0, objective=obj_fn, **extra):
    """(parameters, state) after one update; `scale` multiplies the gradient."""
    extra = EXTRA | extra
    grads, value = gradient(params, extra["inputs"], objective)
    grads = jax.tree.map(lambda g: scale * g, grads)
    updates, state = tx.update(grads, state, params, **(value | extra))
    return optax.apply_updates(params, updates), state


def run(tx, params, state=None, **extra):
    """(parameters, state) after `STEPS` steps in one scan, whose carry must keep its dtypes."""

    def body(carry, _):
        return step(tx, *carry, **extra), None

    carry = (params, tx.init(params) if state is None else state)
    return jax.lax.scan(body, carry, length=STEPS)[0]


def assert_close(ours, expected, rtol=1e-6, atol=0.0):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, float), np.asarray(y, float)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, equal_nan=False)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def accepted(state):
    """Numbers of samples that each average of curvature has taken."""
    return [int(n) for _, n in optax.tree.get_all_with_path(state, "accepted")]


def classifier(logits):
    """Extra arguments for a model of two classes on a batch with one label."""

    def loss(params, inputs):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, inputs), jnp.zeros(4, int)
        )
        return losses.mean()

    return {"inputs": jnp.ones((4, 1)), "logits_fn": logits, "obj_fn": loss, "value": 1.0}
