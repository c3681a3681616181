"""The table of docs/wrappers.md: how each wrapper of optax treats our extra arguments."""

import dataclasses
import doctest
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from optax.experimental import aggregating
from places import ROOT

from sophia_optax import orthosoph, soaa, sophia_g, sophia_geometric, sophia_h, sophia_lite

PAGE = ROOT / "docs/wrappers.md"

# ---------------------------------------------------------------- the page and the optimizers

CELL = r" *(.*?) *\|"
ROWS = re.findall(rf"^\| `([^`]*)` \|{CELL}{CELL}{CELL}", PAGE.read_text(), re.MULTILINE)


def loss(params):
    return jnp.mean(jnp.cosh(params["w"]) * jnp.exp(params["b"]))


def logits(params):
    return params["w"] + params["b"]


OPTIMIZERS = {  # column: factory, extra arguments of `update`
    "sophia_h": (0, sophia_h, {"obj_fn": loss, "refresh": True}),
    "sophia_g": (0, sophia_g, {"logits_fn": logits, "refresh": True}),
    "sophia_lite": (1, sophia_lite, {}),
    "sophia_geometric": (1, sophia_geometric, {}),
    "orthosoph": (1, orthosoph, {}),
    "soaa": (2, functools.partial(soaa, total_steps=10), {"value": 1.5}),
}
VARIANTS = {"sophia_g", "sophia_geometric"}  # each reads the same arguments as another one
PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2), "b": np.ones(2, np.float32)}
GRADS = {"w": np.linspace(1, 3, 6, dtype=np.float32).reshape(3, 2), "b": np.full(2, 0.5, "float32")}
SAMPLE = {"w": np.full((3, 2), 0.7, np.float32), "b": np.full(2, 0.2, np.float32)}


def same(tree: Any) -> Any:
    return tree


# ---------------------------------------------------------------- the wrappers


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """How a wrapper is built and called, and what the optimizer inside sees."""

    wrap: Callable[[Callable[..., Any]], Any]
    """`(learning rate -> optimizer) -> wrapped optimizer`."""
    inner: Callable[[Any], Any]
    """The optimizer's own state."""
    passes: Callable[[Any], Any] = same
    """The form of params, gradient and sample that the optimizer gets."""
    tree: Callable[[Any], Any] = same
    """The form in which the wrapper takes params and gradient."""
    params: Callable[[Any], Any] = same
    """What it takes in place of params."""
    hessian: Callable[[Any], Any] = same
    """The form in which it takes a sample."""
    calls: int = 1
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the wrapper itself reads."""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the optimizer."""


def around(wrapper, *args, **kwargs):
    return lambda make: wrapper(make(0.1), *args, **kwargs)


def injected(wrapper):
    return lambda make: wrapper(lambda learning_rate: make(learning_rate))(learning_rate=0.1)


def only_w(tree):
    return {"w": tree["w"]}


def flat(tree):
    return ravel_pytree(tree)[0]


def low_rank(tree):
    """The gradient in GaLore's basis, which transforms neither params nor samples."""
    u, _, _ = jnp.linalg.svd(tree["w"], full_matrices=False)
    return {"w": u[:, :1].T @ tree["w"], "b": tree["b"]}


def with_complex_w(tree):
    return {"w": tree["w"] * (1 + 2j), "b": tree["b"]}


def in_pairs(tree):
    return {"w": (tree["w"], 2 * tree["w"]), "b": tree["b"]}


ONLY_W = {"w": True, "b": False}
NOT_W = {"w": False, "b": True}
PARTS = {True: "ours", False: "frozen"}
LABELS = jax.tree.map(PARTS.get, ONLY_W)


def partitioned(wrapper):
    def wrap(make):
        groups = {"ours": make(0.1), "frozen": optax.set_to_zero()}
        return wrapper(groups, LABELS, mask_compatible_extra_args=True)

    return wrap


def inner_state(state):
    return state.inner_state


def ours(state):
    return state.inner_states["ours"].inner_state


PARTITION = {"inner": ours, "passes": only_w}
MULTI = Wrapper(around(optax.MultiSteps, 2), lambda s: s.inner_opt_state, calls=2)
SMALL = functools.partial(optax.skip_large_updates, max_squared_norm=1e9)
ADVERSARY = optax.sgd(0.1)
SYNCED = optax.LookaheadParams.init_synced
NO_DECAY = {"weight_decay": 0.0}

WRAPPERS = {
    "chain": Wrapper(lambda make: optax.chain(optax.clip(9.0), make(0.1)), lambda s: s[1]),
    "named_chain": Wrapper(
        lambda make: optax.named_chain(("ours", make(0.1))), lambda s: s["ours"]
    ),
    "freeze": Wrapper(lambda make: optax.chain(make(0.1), optax.freeze(NOT_W)), lambda s: s[0]),
    "contrib.reduce_on_plateau": Wrapper(
        lambda make: optax.chain(make(0.1), optax.contrib.reduce_on_plateau()),
        lambda s: s[0],
        extra={"value": 1.5},
    ),
    "with_extra_args_support": Wrapper(around(optax.with_extra_args_support), same),
    "inject_hyperparams": Wrapper(injected(optax.inject_hyperparams), inner_state),
    "inject_stateful_hyperparams": Wrapper(
        injected(optax.inject_stateful_hyperparams), inner_state
    ),
    "MultiSteps": MULTI,
    "MultiSteps(should_skip_update_fn=skip_not_finite)": dataclasses.replace(
        MULTI, wrap=around(optax.MultiSteps, 2, should_skip_update_fn=optax.skip_not_finite)
    ),
    "MultiSteps(should_skip_update_fn=skip_large_updates)": dataclasses.replace(
        MULTI, wrap=around(optax.MultiSteps, 2, should_skip_update_fn=SMALL)
    ),
    "apply_if_finite": Wrapper(around(optax.apply_if_finite, 3), inner_state),
    "conditionally_transform": Wrapper(
        around(optax.conditionally_transform, lambda step: step == 0), inner_state
    ),
    "conditionally_mask": Wrapper(
        around(optax.conditionally_mask, lambda step: step == 0), inner_state
    ),
    "monitor": Wrapper(
        lambda make: optax.monitor({"ours": make(0.1)}), lambda s: s.measure_states[0]
    ),
    "contrib.schedule_free": Wrapper(
        around(optax.contrib.schedule_free, 0.1), lambda s: s.base_optimizer_state
    ),
    "contrib.mechanize": Wrapper(around(optax.contrib.mechanize), lambda s: s.base_optimizer_state),
    "masked": Wrapper(
        around(optax.masked, ONLY_W, mask_compatible_extra_args=True), inner_state, passes=only_w
    ),
    "partition": Wrapper(partitioned(optax.partition), **PARTITION),
    "multi_transform": Wrapper(partitioned(optax.multi_transform), **PARTITION),
    "selective_transform": Wrapper(
        around(optax.selective_transform, freeze_mask=NOT_W),
        lambda s: s.inner_states["train"].inner_state,
        passes=only_w,
    ),
    "flatten": Wrapper(around(optax.flatten), same, passes=flat, hessian=flat),
    "experimental.aggregating.process": Wrapper(
        lambda make: aggregating.process(
            optax.with_extra_args_support(optax.identity()),
            optax.with_extra_args_support(optax.identity()),
            make(0.1),
        ),
        lambda s: s[2],
    ),
    "lookahead": Wrapper(around(optax.lookahead, 2, 0.5), lambda s: s.fast_state, params=SYNCED),
    "contrib.sam": Wrapper(around(optax.contrib.sam, ADVERSARY), lambda s: s.opt_state, calls=2),
    "contrib.sam(opaque_mode=True)": Wrapper(
        around(optax.contrib.sam, ADVERSARY, opaque_mode=True),
        lambda s: s.opt_state,
        extra={"grad_fn": lambda params, i: GRADS},
    ),
    "contrib.split_real_and_imaginary": Wrapper(
        around(optax.contrib.split_real_and_imaginary),
        inner_state,
        tree=with_complex_w,
        passes=in_pairs,
    ),
    "contrib.scale_by_galore": Wrapper(
        lambda make: optax.contrib.scale_by_galore(rank=1, base_optimizer=make(0.1)),
        lambda s: s.base_optimizer_state,
        passes=low_rank,
        arguments=NO_DECAY,
    ),
    "contrib.galore": Wrapper(
        lambda make: optax.contrib.galore(1.0, rank=1, base_optimizer=make(0.1)),
        lambda s: s[0].base_optimizer_state,
        passes=low_rank,
        arguments=NO_DECAY,
    ),
}

# ---------------------------------------------------------------- what happens


def bind(tx, **extra):
    """As in docs/wrappers.md."""
    return optax.GradientTransformation(tx.init, functools.partial(tx.update, **extra))


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def state_inside(wrapper, make, told):
    """The optimizer's state after one of its updates."""
    tx, params = wrapper.wrap(make), wrapper.params(arrays(wrapper.tree(PARAMS)))
    grads, state = arrays(wrapper.tree(GRADS)), tx.init(params)
    for _ in range(wrapper.calls):
        _, state = tx.update(grads, state, params, **(wrapper.extra | told))
    return jax.tree.leaves(wrapper.inner(state))


def state_alone(wrapper, make, told):
    """The expected value: the same optimizer on the same arrays without the wrapper."""
    tx, params, grads = make(0.1), *(arrays(wrapper.passes(x)) for x in (PARAMS, GRADS))
    return jax.tree.leaves(tx.update(grads, tx.init(params), params, **told)[1])


def hears(wrapper, make, told, told_alone, bound):
    inside = (lambda rate: bind(make(rate), **told)) if bound else make
    try:
        ours = state_inside(wrapper, inside, {} if bound else told)
    except (TypeError, ValueError):
        return False
    alone = state_alone(wrapper, make, told_alone)
    if list(map(jnp.shape, ours)) != list(map(jnp.shape, alone)):
        return False
    return all(np.allclose(x, y) for x, y in zip(ours, alone, strict=True))


def outcome(wrapper, factory, told):
    """The first call on the page that works."""
    make = functools.partial(factory, **wrapper.arguments)
    ways = {"works": (told, told, False)}
    if "refresh" in told:
        sample, alone = wrapper.hessian(SAMPLE), wrapper.passes(SAMPLE)
        ways["`hessian=`"] = {"hessian": arrays(sample)}, {"hessian": arrays(alone)}, False
    ways["bound"] = told, told, True
    return next((name for name, way in ways.items() if hears(wrapper, make, *way)), "cannot")


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(n, marks=[pytest.mark.slow] if n in VARIANTS else []) for n in OPTIMIZERS],
)
@pytest.mark.filterwarnings("ignore:inject_stateful_hyperparams is deprecated")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_cell_of_the_table_is_what_happens(row, optimizer):
    name, *cells = row
    column, factory, told = OPTIMIZERS[optimizer]
    assert outcome(WRAPPERS[name], factory, told) == cells[column]


def test_each_wrapper_that_is_tried_has_one_row():
    assert sorted(name for name, *_ in ROWS) == sorted(WRAPPERS)


def takes_a_transformation(value):
    if not callable(value):
        return False
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # of a builtin
        return False
    return any("GradientTransformation" in str(p) or p.name == "inner_factory" for p in parameters)


def test_the_table_has_every_name_of_optax_that_takes_a_transformation():
    found = {
        lead + name
        for lead, module in (("", optax), ("contrib.", optax.contrib))
        for name in dir(module)
        if takes_a_transformation(getattr(module, name))
    }
    # These take a line search and an estimator, and hold no optimizer.
    assert found - {"lbfgs", "contrib.sophia"} <= {name for name, *_ in ROWS}
    assert "lookahead" in found and "contrib.sam" in found


def test_the_examples_of_the_page_run():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried > 10 and not failed
