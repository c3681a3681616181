"""optax's own contract tests, as its wheel ships them, run on our factories."""

import importlib.util
import unittest
import warnings

import optax.contrib
import pytest

from sophia_optax import sophia_h


def sophia_cases(factory, monkeypatch) -> list[unittest.TestCase]:
    """The cases of optax/contrib/_common_test.py for 'sophia', with our factory in its place."""
    monkeypatch.setattr(optax.contrib, "sophia", factory)
    spec = importlib.util.find_spec("optax.contrib._common_test")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    return [t for group in suite for t in group if "opt_name='sophia'" in t.id()]


@pytest.mark.filterwarnings("ignore")  # optax's own code warns
def test_sophia_h_passes_the_sixteen_cases_of_optax(monkeypatch):
    cases = sophia_cases(sophia_h, monkeypatch)
    result = unittest.TestResult()
    with warnings.catch_warnings():
        unittest.TestSuite(cases).run(result)
    problems = [f"{test.id()}\n{text}" for test, text in result.errors + result.failures]
    assert not problems, "\n".join(problems)
    assert result.testsRun == 16
    assert not result.skipped
