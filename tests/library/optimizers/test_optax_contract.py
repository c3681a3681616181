"""optax's own contract tests, as its wheel ships them, run on our factories."""

import functools
import importlib.util
import unittest
import warnings

import jax
import optax.contrib
import pytest

from sophia_optax import (
    gauss_newton_bartlett,
    orthosoph,
    soaa,
    sophia_g,
    sophia_geometric,
    sophia_h,
    sophia_lite,
)


def given_the_objective(factory, **arguments):
    """A factory whose `update` derives our extra arguments from optax's only one, `obj_fn`."""

    def make(learning_rate: optax.ScalarOrSchedule):
        tx = factory(learning_rate, **arguments)

        @functools.partial(jax.jit, static_argnames="obj_fn")  # optax steps without, op by op
        def update(updates, state, params, *, obj_fn, **extra):
            made = {
                "value": obj_fn(params),
                "logits_fn": lambda params: obj_fn(params).reshape(1, 1),
            }
            return tx.update(updates, state, params, obj_fn=obj_fn, **made, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


STEPS = 30_000  # of optax's descents
FACTORIES = {
    "sophia_h": sophia_h,  # takes the place of optax's as it is
    "sophia_g": given_the_objective(
        sophia_g, estimator=gauss_newton_bartlett(likelihood="gaussian")
    ),
    "sophia_lite": given_the_objective(sophia_lite),
    "sophia_geometric": given_the_objective(sophia_geometric),
    "soaa": given_the_objective(soaa, total_steps=STEPS),
    "orthosoph": given_the_objective(orthosoph),
}


@pytest.fixture(scope="module")
def cases() -> list[unittest.TestCase]:
    """The cases of optax/contrib/_common_test.py for 'sophia'."""
    spec = importlib.util.find_spec("optax.contrib._common_test")
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(action="ignore"):
        spec.loader.exec_module(module)
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    return [t for group in suite for t in group if "opt_name='sophia'" in t.id()]


@pytest.mark.filterwarnings("ignore")  # optax's own code warns
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "sophia_g" else []) for n in FACTORIES],
)
def test_each_alias_passes_the_sixteen_cases_of_optax(name, cases, monkeypatch):
    monkeypatch.setattr(optax.contrib, "sophia", FACTORIES[name])
    result = unittest.TestResult()
    for case in cases:
        case.run(result)
    problems = [f"{test.id()}\n{text}" for test, text in result.errors + result.failures]
    assert not problems, "\n".join(problems)
    assert result.testsRun == 16
    assert not result.skipped
