"""The notebooks run from scratch, and their stories are true."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

QUESTIONS = """
import json
print(json.dumps({name: np.asarray(path).tolist() for name, path in paths.items()}))
print(json.dumps({"steps": STEPS, "needed": {n: c.tolist() for n, c in needed.items()}}))
print(json.dumps({"difference": float(difference)}))
"""


def run(path: Path, figures: Path, questions: str) -> list[dict]:
    """Executes a notebook of the clone, its figures written to a folder of their own.

    Returns the JSON lines that `questions`, run as a last cell, prints.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"../docs/', f'"{figures}/')
    notebook.cells.append(nbformat.v4.new_code_cell(questions))
    client = NotebookClient(
        notebook,
        timeout=180,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    printed = "".join(output["text"] for output in notebook.cells[-1].outputs)
    return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture(scope="module")
def curvature_by_hand(tmp_path_factory):
    figures = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # this clone, installed or not
        patch.setenv("MPLBACKEND", "agg")
        paths, race, probe = run(ROOT / "notebooks/1_curvature_by_hand.ipynb", figures, QUESTIONS)
    return {name: np.array(path) for name, path in paths.items()}, race | probe, figures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook_has_no_outputs(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert cells
    assert not any(c.outputs or c.execution_count for c in cells)


def test_newton_ends_at_the_saddle(curvature_by_hand):
    paths, race, _ = curvature_by_hand
    assert np.abs(paths["Newton"][race["steps"]] - (0, 4)).max() < 1e-3


def test_sophia_ends_at_the_minimum_where_gradient_descent_is_still_on_its_way(curvature_by_hand):
    paths, race, _ = curvature_by_hand
    left = {name: np.linalg.norm(path[race["steps"]] - (1, 4)) for name, path in paths.items()}
    assert left["Sophia"] < 0.05
    assert left["gradient descent"] > 0.5


def test_each_path_has_the_best_rate_of_its_sweep_and_only_newton_never_arrives(curvature_by_hand):
    paths, race, _ = curvature_by_hand
    for name, path in paths.items():
        outside = ~(np.linalg.norm(path - (1, 4), axis=-1) <= 0.05)
        steps = 1 + np.flatnonzero(outside).max()
        assert abs(steps - min(race["needed"][name])) <= 1  # vmap may round differently
        assert (steps == len(path)) == (name == "Newton")


def test_sign_descent_adam_and_sophia_start_on_the_diagonal(curvature_by_hand):
    paths, _, _ = curvature_by_hand
    slope = {name: np.divide(*np.flip(path[1] - path[0])) for name, path in paths.items()}
    for name in ("sign descent", "Adam", "Sophia"):
        assert slope[name] == pytest.approx(1, rel=1e-4)
    assert slope["gradient descent"] < 0.8


def test_one_probe_is_exact_on_a_diagonal_hessian(curvature_by_hand):
    assert curvature_by_hand[1]["difference"] < 1e-4


def test_the_readme_figure_is_made_by_the_notebook(curvature_by_hand):
    made = (curvature_by_hand[2] / "toy_paths.png").read_bytes()
    assert made[:8] == b"\x89PNG\r\n\x1a\n" and len(made) > 20_000
