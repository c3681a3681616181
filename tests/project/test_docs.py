"""The documentation can fail the build. Doctests of modules run by themselves (pyproject.toml)."""

import ast
import doctest
import inspect
import re
import runpy
import textwrap

import pytest
from places import ROOT

import models
import sophia_optax
import sophia_optax.flax
import train

PUBLIC = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (sophia_optax, sophia_optax.flax, models, train)
    for name in package.__all__
}
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
CLASSES = [name for name, value in PUBLIC.items() if inspect.isclass(value)]
# Runs take minutes, `preset` makes a Config, and an Estimator is called by the library alone.
WITHOUT_EXAMPLE = {"train.train", "train.resume"}
WITHOUT_SOURCE = {"sophia_optax.diagnostics", "sophia_optax.flax.of_params"}


def definition(name):
    """Source lines and syntax tree: unlike `__doc__` these hold no text that Python made up."""
    source = textwrap.dedent(inspect.getsource(PUBLIC[name]))
    return source.splitlines(), ast.parse(source).body[0]


# The command line shows the docstring of the class, which a text of the field would hide.
SAID_BY_CLASS = {"optim"}


def assert_documents(doc, parameters):
    section = re.search(r"Args:\n(.*?)(\n\n|$)", doc, re.DOTALL)
    described = re.findall(r"^  \**(\w+): ", section.group(1), re.MULTILINE) if section else []
    assert described == [name for name in parameters if name != "self"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_documents_every_argument_source_and_example(name):
    doc, parameters = inspect.getdoc(PUBLIC[name]), inspect.signature(PUBLIC[name]).parameters
    assert_documents(doc, parameters)
    assert "Returns:" in doc
    assert ">>> " in doc or name in WITHOUT_EXAMPLE
    if name.startswith("sophia_optax."):
        assert "Source: " in doc or name in WITHOUT_SOURCE


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_documents_every_field_argument_and_example(name):
    lines, node = definition(name)
    doc = ast.get_docstring(node)
    assert doc
    assert ">>> " in doc or name in WITHOUT_EXAMPLE
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            line = lines[field.lineno - 1]
            said = "  # " in line or is_text(after) or field.target.id in SAID_BY_CLASS
            assert said, f"{line}: say what it is, in which unit"
    methods = {x.name: x for x in node.body if isinstance(x, ast.FunctionDef)}
    method = methods.get("__init__", methods.get("__call__"))
    if method is not None:
        arguments = ast.walk(method.args)
        assert_documents(doc, [x.arg for x in arguments if isinstance(x, ast.arg)])


def is_text(node):
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant and isinstance(node.value.value, str)


@pytest.fixture(scope="module")
def api():
    return runpy.run_path(str(ROOT / "docs/api.py"))


def test_the_api_page_is_what_the_docstrings_say(api):
    stale = f"docs/api.md is stale; write it again: {api['COMMAND']}"
    assert (ROOT / "docs/api.md").read_text() == api["page"](), stale


def test_the_api_page_has_an_entry_for_each_public_name_and_links_to_no_other(api):
    page, names = api["page"](), sophia_optax.__all__
    assert re.findall(r"^### `(\w+)`$", page, re.MULTILINE) == names
    assert set(re.findall(r"\]\(#(\w+)\)", page)) == {name.lower() for name in names}
    for name in names:  # to its end
        doc = inspect.getdoc(PUBLIC[f"sophia_optax.{name}"])
        assert re.split(r"\n *|: ", doc)[-1] in page


def test_the_api_page_renders_each_part_of_a_docstring(api):
    """A section as a list, an equation and an example as code, stars and angles as themselves."""
    assert api["render"]("Args:\n  b1: decay, a\n    c: of m.\n  **extra: passed on.") == (
        "**Args:**\n\n- `b1`: decay, a\n  - `c`: of m.\n- `**extra`: passed on."
    )
    assert api["render"]("Returns:\n  A dict:\n    a, b: two.\n  Empty at first.") == (
        "**Returns:**\n\nA dict:\n  - `a`, `b`: two.\n\nEmpty at first."
    )
    assert api["render"]("    m <- b1 m\n      + g") == "```text\nm <- b1 m\n  + g\n```"
    assert api["render"](">>> 1 + 1\n2") == "```python\n>>> 1 + 1\n2\n```"
    assert api["render"]("Source: a * b, `c * d` <e> 1 < 2") == (
        r"**Source:** a \* b, `c * d` \<e> 1 < 2"
    )


def test_the_api_page_shows_signatures_as_they_are_written(api):
    assert api["signature"](sophia_optax.shift) == (
        "def shift(eps: ArrayLike, rho: ArrayLike = 1.0) -> Denominator"
    )
    state = api["signature"](sophia_optax.CenteredMomentState).splitlines()
    assert state[:2] == [
        "class CenteredMomentState(NamedTuple):",
        "    count: jax.Array  # int32 (), updates seen",
    ]


def test_the_recipes_run():
    failed, tried = doctest.testfile(str(ROOT / "docs/recipes.md"), module_relative=False)
    assert tried > 15 and not failed


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", ["docs/recipes.md", "docs/wrappers.md"])
def test_links_to_headings_lead_to_one(name):
    for page, mark in re.findall(r"\]\(([\w.]*)#([^)]*)\)", (ROOT / name).read_text()):
        text = (ROOT / "docs" / page if page else ROOT / name).read_text()
        assert mark in map(anchor, re.findall(r"^## (.*)$", text, re.MULTILINE)), mark


def test_the_table_of_contents_of_the_recipes_lists_each_in_its_order():
    text = (ROOT / "docs/recipes.md").read_text()
    listed = re.findall(r"^  - \[(.*)\]\(#(.*)\)$", text, re.MULTILINE)
    assert [title for title, _ in listed] == re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert all(target == anchor(title) for title, target in listed)


def test_the_readme_example_runs_for_both_optimizers(capsys):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    exec(compile(block, "README.md", "exec"), {})
    lines = capsys.readouterr().out.split("\n")[:2]
    assert all(0 <= float(line.split()[1]) <= 1 for line in lines)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/conventions.md",
        "docs/recipes.md",
        "docs/wrappers.md",
        "docs/breakages.md",
        "docs/api.md",
        "LOG.md",
        "CHANGELOG.md",
    ],
)
def test_links_to_files_lead_somewhere(name):
    path = ROOT / name
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert "://" in target or (path.parent / target).exists(), target


def test_every_make_target_and_file_that_the_readme_names_exists():
    text, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?\bmake (\w+)`", text):
        assert f"\n{target}:" in makefile
    for path in re.findall(r"`((?:notebooks|benchmarks|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
