"""Imports run one way, between packages and between rooms, and modules have no import cycle.

docs/architecture.md shows the rooms.
"""

import ast
import graphlib

import pytest
from places import ROOT

# Each room imports only rooms above it. A module that is listed is a room of its own.
ROOMS = [
    "models",
    "sophia_optax.numerics",
    "sophia_optax.sharding",
    "sophia_optax.checks",
    "sophia_optax.estimators",
    "sophia_optax.transforms",
    "sophia_optax.optimizers",
    "sophia_optax.diagnostics",
    "sophia_optax.flax",
    "sophia_optax",
    "train.extras",
    "train.files",
    "train.differences",
    "train.lock",
    "train.step.batch",
    "train.data",
    "train.parallel",
    "train.optimizers",
    "train.logging.profiler",
    "train.config",
    "train.step",
    "train.inputs",
    "train.program",
    "train.eval_program",
    "train.plan.flops",
    "train.logging",
    "train.checkpoint",
    "train.plan",
    "train.evaluate",
    "train.generate",
    "train.baseline",
    "train.report",
    "train.stepping",
    "train.loop",
    "train.convert",
    "train",
    "train.cli",
    "train.__main__",
]
OUTSIDE = {"sophia_optax": {"jax", "numpy", "optax"}, "sophia_optax.flax": {"flax", "jax", "optax"}}


def modules():
    """Name -> syntax tree."""
    found = {}
    for package in ("sophia_optax", "models", "train"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "make.py":  # a separate program
                parts = path.relative_to(ROOT).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes(tree):
    """All nodes except those that only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if not is_for_types(child):
            yield child
            yield from nodes(child)


def imported(name):
    """The modules that a module imports anywhere in its code; of packages, the named submodules."""
    for node in nodes(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def room_of(module):
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


@pytest.mark.parametrize("name", MODULES)
def test_rooms_import_only_rooms_above_them(name):
    here = ROOMS.index(room_of(name))
    below = {other for other in imported(name) if other in MODULES and other != name}
    wrong = {other for other in below if ROOMS.index(room_of(other)) > here}
    assert not wrong, f"{name} imports {sorted(wrong)}, which come after {ROOMS[here]}"


def test_imports_have_no_cycle():
    graph = {
        name: {other for other in imported(name) if other in MODULES and other != name}
        for name in MODULES
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("sophia_optax")])
def test_the_library_imports_only_jax_and_optax(name):
    standard = {"sophia_optax", "__future__", *__import__("sys").stdlib_module_names}
    allowed = OUTSIDE.get(name, OUTSIDE["sophia_optax"]) | standard
    assert {other.partition(".")[0] for other in imported(name)} <= allowed


def test_every_module_has_a_room():
    assert {room_of(name) for name in MODULES} == set(ROOMS)
