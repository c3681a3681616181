"""The notebooks run from scratch, and their claims hold."""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from places import ROOT

from train.parallel import xla_flags

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

QUESTIONS = """
import json
print(json.dumps({name: np.asarray(path).tolist() for name, path in paths.items()}))
print(json.dumps({"steps": STEPS, "needed": {n: c.tolist() for n, c in needed.items()}}))
print(json.dumps({"difference": float(difference)}))
"""

ABOUT_ESTIMATORS = """
import json
from models import DecoderConfig, split
p = unravel(theta)
weights = {
    "tokens": {"embedding": p["tokens"]},
    "positions": {"embedding": p["positions"]},
    "norm": {"scale": p["norm"]},
    "blocks": {
        "00": {
            "attention_norm": {"scale": p["attention_norm"]},
            "attention": {name: p[name] for name in ("query", "key", "value", "out")},
            "mlp_norm": {"scale": p["mlp_norm"]},
            "mlp": {name: p[name] for name in ("up", "down")},
        }
    },
}
config = DecoderConfig(
    vocab_size=VOCABULARY, context=CONTEXT, width=WIDTH, layers=1, heads=HEADS
)
outputs = split(config).apply(weights, batch[:, :-1])
difference = np.abs(outputs - logits_fn(p, batch)).max() / np.abs(outputs).max()
print(json.dumps({
    "difference": float(difference),
    "distance": float(error(G, H)),
    "bias": bias,
    "spread": {name: float(z.std()) for name, z in scores.items()},
    "inflation": [[int(step), B, *map(float, pair)] for (step, B), pair in inflation.items()],
    "one": {name: [float(x) for x in pair] for name, pair in one.items()},
    "cost": cost,
    "decays": DECAYS.tolist(),
    "moving": {name: [float(x) for x in errors] for name, errors in moving.items()},
}))
"""


def run(path: Path, figures: Path, questions: str, **reduced: int) -> list[dict]:
    """Executes a notebook of the clone, with figures written to another folder.

    `reduced` lowers constants of the notebook. `questions` is run as a last cell; the function
    returns the JSON lines that it prints.
    """
    notebook = nbformat.read(path, as_version=4)
    for name, value in reduced.items():
        (cell,) = (c for c in notebook.cells if re.search(rf"^{name} = ", c.source, re.MULTILINE))
        cell.source = re.sub(
            rf"^{name} = \d+", f"{name} = {value}", cell.source, flags=re.MULTILINE
        )
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
        patch.setenv("PYTHONPATH", str(ROOT))  # import this clone
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


def test_sophia_reaches_the_minimum_before_gradient_descent(curvature_by_hand):
    paths, race, _ = curvature_by_hand
    left = {name: np.linalg.norm(path[race["steps"]] - (1, 4)) for name, path in paths.items()}
    assert left["Sophia"] < 0.05
    assert left["gradient descent"] > 0.5


def test_each_path_has_its_best_rate_and_only_newton_never_arrives(curvature_by_hand):
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


@pytest.fixture(scope="module")
def estimators(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("MPLBACKEND", "agg")
        # Its loops are long, so some optimisation pays; fusion emitters compile slowly.
        options = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
        patch.setenv("XLA_FLAGS", xla_flags.flags(options))
        path, figures = ROOT / "notebooks/2_estimators.ipynb", tmp_path_factory.mktemp("figures")
        (answers,) = run(path, figures, ABOUT_ESTIMATORS, SAMPLES=200, TEXT=2048)
    return answers


GROUPS = {number: f"GNB, {number} group{'s' * (number > 1)}" for number in (1, 4, 16)}


@pytest.mark.slow
def test_the_transformer_of_the_notebook_is_the_decoder_of_models(estimators):
    assert estimators["difference"] < 1e-5


def test_each_estimator_is_unbiased_for_its_own_target(estimators):
    assert len(estimators["bias"]) == 5
    for name, (bias, standard_error) in estimators["bias"].items():
        assert standard_error < 0.03
        assert abs(bias) < 5 * standard_error, name
        assert estimators["spread"][name] == pytest.approx(1, abs=0.15), name


def test_the_bias_of_the_squared_gradient_grows_with_the_batch_until_the_gradient_vanishes(
    estimators,
):
    inflation = {(step, B): pair for step, B, *pair in estimators["inflation"]}
    for step in (100, 500):
        ratio, standard_error = inflation[step, 1024]
        assert ratio - 5 * standard_error > inflation[step, 16][0]
    assert inflation[100, 4096][0] > 5
    assert inflation[990, 1024][0] == pytest.approx(1, abs=0.15)


def test_sixteen_groups_have_the_lowest_error_at_any_cost(estimators):
    one, cost = estimators["one"], estimators["cost"]
    single, sixteen = (GROUPS[number] for number in (1, 16))
    assert one[single] == pytest.approx([2, 2], rel=0.15)
    assert all(7 < a / b < 16 for a, b in zip(one[single], one[sixteen], strict=True))
    assert cost[sixteen] < 1.1 * cost[single] < 1.2
    for name in ("Hutchinson, Rademacher", "Hutchinson, normal"):
        assert 2 < cost[name] < 3.5
        assert one[name][0] * cost[name] > 50 * one[sixteen][0] * cost[sixteen]


def test_hutchinson_needs_many_gradients_to_beat_gauss_newton(estimators):
    name = "Hutchinson, Rademacher"
    needed = estimators["one"][name][0] / estimators["distance"] * estimators["cost"][name]
    assert 100 < needed < 1000


def test_sixteen_groups_allow_a_shorter_memory(estimators):
    decays, moving = np.array(estimators["decays"]), estimators["moving"]
    single, sixteen = (np.array(moving[GROUPS[number]]) for number in (1, 16))
    advised = (decays > 0.75) & (decays < 0.96)
    assert advised.sum() >= 5
    assert np.all(sixteen[advised] < single[-1] / 2)  # the last is b2 = .99
    assert single[-1] < 1.6 * sixteen[-1]
    assert np.all(sixteen[(decays > 0.5) & (decays < 0.98)] < single.min())
    # The rest is lag. One path of samples: a little more or less than without noise.
    assert 0.5 < moving["exact samples"][-1] / sixteen[-1] < 1.2
