"""Errors in the documentation fail the build. pytest runs the doctests of modules itself."""

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
# These train for minutes.
WITHOUT_EXAMPLE = {"train.train", "train.resume"}
WITHOUT_SOURCE = {"sophia_optax.diagnostics", "sophia_optax.flax.of_params"}


def definition(name):
    """Source lines and syntax tree; `__doc__` may hold text that Python generated."""
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


def test_the_api_page_is_up_to_date(api):
    stale = f"docs/api.md is stale. Write it again: {api['COMMAND']}"
    assert (ROOT / "docs/api.md").read_text() == api["page"](), stale


def test_the_api_page_has_an_entry_for_each_public_name_and_links_to_no_other(api):
    page, names = api["page"](), sophia_optax.__all__
    assert re.findall(r"^### `(\w+)`$", page, re.MULTILINE) == names
    assert set(re.findall(r"\]\(#(\w+)\)", page)) == {name.lower() for name in names}
    for name in names:  # each docstring is there to its end
        doc = inspect.getdoc(PUBLIC[f"sophia_optax.{name}"])
        assert re.split(r"\n *|: ", doc)[-1] in page


def test_the_api_page_renders_each_part_of_a_docstring(api):
    """Sections become lists, equations and examples code; stars and angle brackets are escaped."""
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
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_table_of_contents_of_the_recipes_lists_each_in_its_order():
    text = (ROOT / "docs/recipes.md").read_text()
    listed = re.findall(r"^  - \[(.*)\]\(#(.*)\)$", text, re.MULTILINE)
    assert [title for title, _ in listed] == re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert all(target == anchor(title) for title, target in listed)


def test_the_readme_example_prints_what_the_readme_shows(capsys):
    text = (ROOT / "README.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", text, re.DOTALL).groups()
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    number = r"\d+\.\d+"
    assert re.sub(number, "", printed).split() == re.sub(number, "", shown).split()
    for found, stated in zip(*(re.findall(number, x) for x in (printed, shown)), strict=True):
        assert float(found) == pytest.approx(float(stated), abs=0.015)


PAGES = ["README.md", "LOG.md", "CHANGELOG.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_links_to_files_exist(name):
    path = ROOT / name
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert "://" in target or (path.parent / target).exists(), target


def test_the_tables_of_the_readme_have_numbers_of_the_results():
    number = r"[-+]?[\d,]*\.?\d+%?"
    summary = (ROOT / "README.md").read_text().partition("\n## Results\n")[2]
    rows = re.findall(r"^\|.*\d.*\|$", summary, re.MULTILINE)
    rows = [row for row in rows if "docs/" not in row]
    known = set(re.findall(number, (ROOT / "docs/results.md").read_text()))
    assert len(rows) >= 23
    for row in rows:
        assert set(re.findall(number, row.replace("1/", ""))) <= known, row


def headings(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    return map(anchor, re.findall(r"^#+ (.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("name", PAGES)
def test_links_to_headings_exist(name):
    path = ROOT / name
    for page, mark in re.findall(r"\]\(([\w./]*)#([^)]*)\)", path.read_text()):
        assert mark in headings(path.parent / page if page else path), mark


NAMED = re.compile(
    r"`[^`]*?\b((?:notebooks|benchmarks|docs|tests|train|sophia_optax)/[\w./]*)[^`]*`"
)


@pytest.mark.parametrize("name", [page for page in PAGES if page not in ("LOG.md", "CHANGELOG.md")])
def test_every_make_target_module_and_file_that_a_page_names_exists(name):
    """A page may name a test file without its folder, a module without .py, `module.function`."""
    text, makefile = (ROOT / name).read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?\bmake (\w+)`", text):
        assert f"\n{target}:" in makefile
    for path in NAMED.findall(text):
        forms = path, f"{path}.py", f"{path.rpartition('.')[0]}.py"
        assert "NAME" in path or any((ROOT / form).exists() for form in forms), path
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for test in re.findall(r"`(test_\w+\.py)`", text):
        assert any((ROOT / "tests").rglob(test)), test
