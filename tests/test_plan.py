"""A plan against XLA: bytes of state to the byte, the rest to a stated error."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

from models import BERT, LLAMA, PRESETS, DecoderConfig
from train import flops, hlo, plan_tables
from train.config import preset
from train.mesh import MeshConfig
from train.plan import plan

MODEL = DecoderConfig(vocab_size=512, context=64, width=64, layers=2, heads=4)
FSDP = MeshConfig(fsdp=8)


def run_of(optimizer="adamw", mesh=FSDP, optim=(), **model):
    run = preset("tiny", optimizer)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(MODEL, **model),
        optim=dataclasses.replace(run.optim, **dict(optim)),
        mesh=mesh,
        batch_size=32,
        sequence_length=64,
    )


# ---------------------------------------------------------------- collectives in a text

LOOPS = """HloModule m, is_scheduled=true
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%inner (x: (s32[], bf16[8,2])) -> (s32[], bf16[8,2]) {
  %g = bf16[8,2]{1,0} all-gather(%x), dimensions={0}
  ROOT %t = (s32[], bf16[8,2]) tuple(%i, %g)
}
%outer (x: (s32[], bf16[8,2])) -> (s32[], bf16[8,2]) {
  %w = (s32[], bf16[8,2]) while(%x), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %r = (f32[4]{0}, /*index=1*/pred[3]{0}) all-reduce(%a, %b), to_apply=%add
  ROOT %t = (s32[], bf16[8,2]) tuple(%i, %g)
}
%yes (x: f32[]) -> f32[] {
  ROOT %p = f32[7]{0} collective-permute(%x), source_target_pairs={{0,1}}
}
ENTRY %main (x: f32[]) -> f32[] {
  %w = (s32[], bf16[8,2]) while(%x), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %start = (f32[2]{0}, f32[16]{0}) all-gather-start(%x), dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  %k = f32[] conditional(%p, %a, %b), branch_computations={%yes, %add}
  ROOT %k2 = f32[] conditional(%p, %a, %b), true_computation=%yes, false_computation=%add
}
"""  # noqa: E501


def test_collectives_in_nested_loops_count_as_often_as_both_turn():
    assert hlo.collectives(LOOPS) == {
        "all-gather": (15 + 1, 15 * 8 * 2 * 2 + 16 * 4),
        "all-reduce": (3, 3 * (4 * 4 + 3)),
        "collective-permute": (2, 2 * 7 * 4),
    }


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.collectives("HloModule m")


def test_collectives_of_a_scan_in_a_scan_are_those_that_the_program_does():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def talk(a):
        def inner(c, _):
            return jax.lax.psum(c, "x") / 4, None

        def outer(c, _):
            return jax.lax.scan(inner, c, length=3)[0] + 1, jax.lax.all_gather(c, "x")

        return jax.lax.scan(outer, a, length=5)

    talk = jax.shard_map(talk, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(talk).lower(jnp.ones((8, 10))).compile().as_text()
    found = hlo.collectives(text)
    assert found == {"all-reduce": (15, 15 * 320), "all-gather": (5, 5 * 4 * 320)}


# ---------------------------------------------------------------- against XLA


@pytest.fixture(scope="module")
def plain():
    return plan(run_of(), devices=8, compile=True).steps["every step"]


def test_parameters_optimizer_state_and_batch_are_exact(plain):
    assert plain.memory.arguments == plain.compiled.arguments
    assert plain.memory.optimizer > 2 * plain.memory.parameters


def test_operations_are_those_that_xla_counts(plain):
    assert plain.flops == pytest.approx(plain.compiled.flops, rel=0.05)
    lowered = flops.model_flops(dataclasses.replace(MODEL, layers=4), 32, 64)
    assert lowered > 1.5 * 8 * plain.flops * 2 / 4


def test_memory_of_a_plain_step_is_near_what_xla_allots(plain):
    assert plain.memory.total == pytest.approx(plain.compiled.total, rel=0.05)


def test_gathers_and_sums_of_a_plain_step_are_those_of_the_program(plain):
    ours, theirs = plain.on_cpu, plain.compiled.collectives
    assert ours.keys() == theirs.keys() == {"all-gather", "all-reduce"}
    assert ours["all-gather"] == theirs["all-gather"]
    assert ours["all-reduce"].bytes == pytest.approx(theirs["all-reduce"].bytes, rel=0.01)


def test_a_sample_of_curvature_in_scanned_layers():
    """Loops are counted as often as they turn; what is kept is blocks' inputs and one block."""
    run = run_of("sophia-g", optim={"groups": 0, "batch_fraction": 0.5}, scan_layers=True)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, remat="full"))
    step = plan(run, devices=8, compile=True).steps["curvature"]
    ours, theirs = step.on_cpu, step.compiled.collectives
    assert ours["all-gather"] == theirs["all-gather"]
    assert ours["all-reduce"].bytes == pytest.approx(theirs["all-reduce"].bytes, rel=0.01)
    assert step.memory.arguments == step.compiled.arguments
    assert step.memory.total == pytest.approx(step.compiled.total, rel=0.25)
