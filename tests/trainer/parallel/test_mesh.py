"""Where a step is computed changes nothing of it, and moves no more than it must."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from benchmarks.mesh_equality import OPTIMIZERS, Form, difference, forms, reference, several
from models import DecoderConfig
from train import program
from train.config.presets import preset
from train.optimizers.base import Due
from train.parallel.mesh import MeshConfig, make_mesh
from train.plan import hlo

MODEL = DecoderConfig(vocab_size=256, context=16, width=32, layers=1, heads=2)
THE_FULLEST = "sophia-g", Form((2, 2, 2), scan=True, remat="full", accumulation=4)
CASES = [
    pytest.param(*THE_FULLEST, marks=pytest.mark.newest),
    pytest.param("sophia-h", Form((2, 4, 1), scan=True, accumulation=4), marks=pytest.mark.slow),
    pytest.param("orthosoph", Form((2, 2, 2), scan=True, accumulation=4), marks=pytest.mark.slow),
    pytest.param("soaa", Form((1, 1, 8), scan=True), marks=pytest.mark.slow),
    ("adamw", Form((8, 1, 1), remat="full", accumulation=4)),
]


@pytest.mark.parametrize(("optimizer", "form"), CASES, ids=str)
def test_ten_losses_are_those_of_one_device_unrolled_in_one_piece(optimizer, form):
    """Some of what `python -m benchmarks.mesh_equality` tries; curvature at four of the steps."""
    assert difference(optimizer, form) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", list(forms(quick=False)), ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_form_has_the_losses_of_one_device(optimizer, form):
    assert difference(optimizer, form) < 1e-5


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_device():
    alone = np.stack([reference(name) for name in OPTIMIZERS])
    assert np.max(np.abs(several(OPTIMIZERS) / alone - 1)) < 1e-5


def assembled(optimizer, mesh, model=MODEL, **changes):
    run = preset("tiny", optimizer)
    optim = dataclasses.replace(run.optim, **changes)
    shape = {"model": model, "sequence_length": 16, "warmup_steps": 2}
    return program.assemble(dataclasses.replace(run, optim=optim, mesh=mesh, **shape))


@pytest.mark.newest
@pytest.mark.parametrize(
    ("optimizer", "refresh", "changes"),
    [
        ("adamw", None, {}),
        ("sophia-g", True, {}),
        ("sophia-g", True, {"groups": 1}),
        ("sophia-g", True, {"groups": 8, "batch_fraction": 0.5}),
        ("sophia-h", True, {"groups": 1}),
        ("sophia-h", True, {"groups": 2}),
    ],
)
def test_parameters_move_and_rows_stay(optimizer, refresh, changes):
    """Each matrix is gathered for its use, as in a plain step; activations never are exchanged."""
    text = assembled(optimizer, MeshConfig(fsdp=4), **changes).compile(Due(refresh)).as_text()
    gathers = len(re.findall(r" all-gather\(", text))
    matrices = 8  # embedding, positions and six of the block
    passes = 2 if optimizer == "sophia-h" or "batch_fraction" in changes else 1
    passes += optimizer == "sophia-h" and changes["groups"] > 1  # the gradient is a pass apart
    assert 0 < gathers <= matrices * passes + 1
    assert "all-to-all(" not in text and "collective-permute(" not in text


LAYERS = dataclasses.replace(MODEL, layers=4, heads=4, scan_layers=True)
BLOCK, EMBEDDING, POSITIONS = 4 * 12 * 32**2, 4 * 256 * 32, 4 * 16 * 32  # bytes of matrices


def test_scanned_layers_are_gathered_and_reduced_one_by_one_under_fsdp():
    """Each matrix is gathered on the way there and on the way back, and its gradient reduced once
    (XLA on CPU has no reduce-scatter, and reduces both parts of that of a tied table). No array of
    a collective is larger than one matrix: no reduction is of the whole model.
    """
    compiled = assembled("adamw", MeshConfig(data=1, fsdp=8), LAYERS).compile(Due())
    found = hlo.collectives(text := compiled.as_text())
    assert set(found) == {"all-gather", "all-reduce"}
    assert found["all-gather"].bytes == 2 * 4 * BLOCK + EMBEDDING + POSITIONS
    sums = 4 * BLOCK + 2 * EMBEDDING + POSITIONS
    assert sums <= found["all-reduce"].bytes < 1.02 * sums
    arrays = [shape for line in collective_lines(text) for shape in re.findall(r"\[(.*?)\]", line)]
    assert max(math.prod(map(int, a.split(","))) for a in arrays if a) == 256 * 32


def collective_lines(text):
    """What stands before the name of each collective: the shapes of its results."""
    return [line for line, _ in re.findall(r"= (.*?) (all-reduce|all-gather)\(", text)]


def test_a_tensor_axis_reduces_activations_and_gathers_no_matrix():
    """Twice a layer on the way there and twice on the way back, where XLA sums the gradients of
    query, key and value apart; once for the embedding, and once for the head's.
    """
    compiled = assembled("adamw", MeshConfig(data=2, fsdp=1, tensor=4), LAYERS).compile(Due())
    text = compiled.as_text()
    assert set(hlo.collectives(text)) == {"all-reduce"}
    activations = [line.count("f32[8,16,32]") for line in collective_lines(text)]
    assert sum(activations) == 2 + (1 + 3) + 1 + 1
    assert not re.search(r"f32\[32,(32|128)\]\S* all-reduce\(", text)


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h", "adamw", "lion", "muon"])
def test_optimizer_state_is_sharded_like_its_parameters(optimizer):
    state = assembled(optimizer, MeshConfig(fsdp=2, tensor=2)).init()
    matrices = {
        jax.tree_util.keystr(path): x.sharding.spec
        for path, x in jax.tree.leaves_with_path(state.params)
        if x.ndim == 2
    }
    assert all("fsdp" in spec for spec in matrices.values())
    found = 0
    for path, x in jax.tree.leaves_with_path(state.opt_state):
        for parameter, spec in matrices.items():
            if jax.tree_util.keystr(path).endswith(parameter):
                found += 1
                assert x.sharding.spec == spec
                parts = 4 if "tensor" in spec else 2
                assert x.addressable_shards[0].data.size == x.size // parts
    assert found >= len(matrices)


@pytest.mark.parametrize(
    "shape", [MeshConfig(3, 2), MeshConfig(0, 3), MeshConfig(4, 1), MeshConfig(0, 2, 3)]
)
def test_a_mesh_that_leaves_devices_over_is_refused(shape):
    with pytest.raises(ValueError, match="does not use 8 devices exactly"):
        make_mesh(shape)


def test_parameters_that_do_not_divide_over_fsdp_are_refused():
    run = dataclasses.replace(preset(), mesh=MeshConfig(fsdp=3), batch_size=12)
    with pytest.raises(ValueError, match=r"--mesh\.fsdp 3 does not divide the model's width of 64"):
        program.assemble(run, jax.devices()[:3])


@pytest.mark.parametrize(
    ("model", "tensor", "what"),
    [
        ({"heads": 2}, 4, "2 heads"),
        ({"heads": 4, "kv_heads": 2}, 4, "2 key/value heads"),
        ({"heads": 4, "ffn_width": 6}, 4, r"6 hidden units \(ffn_width\)"),
        ({"heads": 4, "vocab_size": 258}, 4, r"258 words \(--model.vocab-multiple pads them\)"),
    ],
)
def test_a_model_that_does_not_divide_over_tensor_is_refused(model, tensor, what):
    with pytest.raises(ValueError, match=f"--mesh.tensor {tensor} does not divide .* {what}"):
        assembled("adamw", MeshConfig(tensor=tensor), dataclasses.replace(MODEL, **model))


def test_a_padded_vocabulary_divides():
    model = dataclasses.replace(MODEL, heads=4, vocab_size=258, vocab_multiple=4)
    programs = assembled("adamw", MeshConfig(tensor=4), model)
    table = programs.abstract.params["tokens"]["embedding"]
    assert table.shape == (260, 32) and table.sharding.shard_shape(table.shape) == (65, 32)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    with pytest.raises(ValueError, match="batch_size=12 does not divide over 8 devices"):
        program.assemble(dataclasses.replace(preset(), batch_size=12))
    same = dataclasses.replace(preset(), batch_size=12, mesh=MeshConfig(data=4, tensor=2))
    assert program.assemble(same)
