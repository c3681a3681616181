"""The documentation can fail the build. Doctests of modules run by themselves (pyproject.toml)."""

import doctest
import inspect
import re
from pathlib import Path

import pytest

import sophia_optax

ROOT = Path(__file__).parent.parent
FUNCTIONS = [
    name for name in sophia_optax.__all__ if inspect.isfunction(getattr(sophia_optax, name))
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_documents_every_argument_source_and_example(name):
    function = getattr(sophia_optax, name)
    doc = inspect.getdoc(function)
    parameters = inspect.signature(function).parameters
    if parameters:
        described = re.search(r"Args:\n(.*?)\n\n", doc, re.DOTALL).group(1)
        missing = [p for p in parameters if not re.search(rf"^  \**{p}: ", described, re.MULTILINE)]
        assert not missing
        extra = set(re.findall(r"^  (\w+): ", described, re.MULTILINE)) - set(parameters)
        assert not extra, "the docstring names arguments that the function lacks"
    assert "Returns:" in doc
    assert ">>> " in doc
    assert name == "diagnostics" or "Source: " in doc


def test_the_recipes_run():
    failed, tried = doctest.testfile(str(ROOT / "docs/recipes.md"), module_relative=False)
    assert tried > 15 and not failed


def test_the_readme_example_runs_for_both_optimizers(capsys):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    exec(compile(block, "README.md", "exec"), {})
    lines = capsys.readouterr().out.split("\n")[:2]
    assert all(0 <= float(line.split()[1]) <= 1 for line in lines)


@pytest.mark.parametrize(
    "name", ["README.md", "docs/conventions.md", "docs/recipes.md", "LOG.md", "CHANGELOG.md"]
)
def test_links_to_files_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def test_every_make_target_and_file_that_the_readme_names_exists():
    text, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?\bmake (\w+)`", text):
        assert f"\n{target}:" in makefile
    for path in re.findall(r"`((?:notebooks|benchmarks|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
