"""Data, models and checkpoints are read, never executed."""

import ast

import pytest
from places import ROOT

MODULES = [
    path for name in ("sophia_optax", "models", "train") for path in (ROOT / name).rglob("*.py")
]
UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
RUN = {"eval", "exec", "compile", "__import__", "system", "popen"}


def risks(source):
    """The calls and imports of a module that execute or unpickle something."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLE]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] * (str(node.module).split(".")[0] in UNPICKLE)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", None)
            found += [name] * (name in RUN)
            keywords = {keyword.arg for keyword in node.keywords}
            found += ["shell="] * ("shell" in keywords)
            found += ["allow_pickle="] * ("allow_pickle" in keywords)
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "os":
            found += [node.attr] * (node.attr in RUN)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_executes_or_unpickles_what_it_reads(path):
    assert not risks(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "eval(x)",
        "np.load(f, allow_pickle=True)",
        "os.system(x)",
        "run(x, shell=True)",
    ],
)
def test_risky_code_is_detected(source):
    assert risks(source)
