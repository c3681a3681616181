"""A plan against XLA: bytes of state to the byte, the rest to a stated error."""

import dataclasses
import io
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

from models import BERT, LLAMA, PRESETS, DecoderConfig
from train.cli import plan as plan_command
from train.config.presets import preset
from train.data import batch_shapes
from train.parallel.mesh import MeshConfig
from train.plan import flops, hlo, report, step_flops
from train.plan.plan import fake_devices, plan
from train.program import assemble

pytestmark = pytest.mark.newest
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
    text = str(jax.jit(talk).lower(jnp.ones((8, 10))).compile().as_text())
    found = hlo.collectives(text)
    assert found == {"all-reduce": (15, 15 * 320), "all-gather": (5, 5 * 4 * 320)}


# ---------------------------------------------------------------- against XLA


@pytest.fixture(scope="module")
def plain():
    return plan(run_of(), devices=8, compile=True).steps["every step"]


def test_parameters_optimizer_state_and_batch_are_exact(plain):
    assert plain.memory.arguments == plain.compiled.arguments
    assert plain.memory.optimizer > 2 * plain.memory.parameters


@pytest.mark.parametrize(
    ("optimizer", "optim", "model"),
    [
        ("adamw", {}, {"mlp": "swiglu", "kv_heads": 2, "tied": False, "ffn_width": 320}),
        ("adamw", {}, {"remat": "full"}),
        ("sophia-g", {"groups": 1, "batch_fraction": 0.5}, {}),
        ("sophia-h", {"groups": 1, "batch_fraction": 0.5}, {}),
    ],
)
def test_operations_are_those_that_xla_counts(optimizer, optim, model):
    """Of a lowered program, in which nothing is merged; its element-wise work is not ours."""
    wide = {"width": 512, "vocab_size": 4096, "layers": 1, **model}
    run = dataclasses.replace(run_of(optimizer, MeshConfig(), optim, **wide), batch_size=256)
    program = assemble(run, jax.devices()[:1])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        batch_shapes(run.data, batch_size=256, sequence_length=64),
    )
    optimizer = program.optimizer
    lowered = program.step.lower(program.abstract, shapes, due=optimizer.due(0))
    ours = step_flops.step_flops(run) + step_flops.curvature_flops(run, optimizer.sampling)
    assert ours == pytest.approx(lowered.cost_analysis()["flops"], rel=0.02)


def test_memory_of_a_plain_step_is_near_what_xla_allots(plain):
    assert plain.memory.total == pytest.approx(plain.compiled.total, rel=0.05)


def test_gathers_and_sums_of_a_plain_step_are_those_of_the_program(plain):
    ours, theirs = plain.on_cpu, plain.compiled.collectives
    assert ours.keys() == theirs.keys() == {"all-gather", "all-reduce"}
    assert ours["all-gather"] == theirs["all-gather"]
    assert ours["all-reduce"].bytes == pytest.approx(theirs["all-reduce"].bytes, rel=0.01)


TABLE = 4 * MODEL.vocab_size * MODEL.width


def gathers_as(theirs, ours):
    """Newer versions of XLA (0.12) gather the token table once for both passes."""
    fewer = hlo.Collective(ours.number - 1, ours.bytes - TABLE)
    assert theirs in (ours, fewer)


@pytest.mark.slow
def test_a_sample_of_curvature_in_scanned_layers():
    """Loops are counted as often as they turn; what is kept is blocks' inputs and one block."""
    run = run_of("sophia-g", optim={"groups": 0, "batch_fraction": 0.5}, scan_layers=True)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, remat="full"))
    step = plan(run, devices=8, compile=True).steps["curvature"]
    assert step.compiled
    ours, theirs = step.on_cpu, step.compiled.collectives
    gathers_as(theirs["all-gather"], ours["all-gather"])
    assert ours["all-reduce"].bytes == pytest.approx(theirs["all-reduce"].bytes, rel=0.01)
    assert step.memory.arguments == step.compiled.arguments
    assert step.memory.total == pytest.approx(step.compiled.total, rel=0.25)


# ---------------------------------------------------------------- shapes alone


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (PRESETS["gpt2-125m"], 0.1236),
        (LLAMA["llama2-7b"], 6.607),
        (BERT["bert-base"], 0.10902),
    ],
)
def test_products_with_parameters_are_two_operations_for_each_that_is_in_one(config, billions):
    """Published counts less the tables that are only looked up, the pooler, norms and biases."""
    assert flops.forward_flops(config, 128)[0] == pytest.approx(2e9 * billions, rel=0.005)


def test_a_device_holds_its_share_and_gathers_the_rest():
    one, eight = (
        plan(run_of(mesh=MeshConfig(fsdp=n)), devices=n).steps["every step"] for n in (1, 8)
    )
    assert one.memory.gathered == 0 and one.collectives == {}
    vectors = 4 * 64 * (2 * 2 + 1)
    assert eight.memory.gathered == one.memory.parameters
    assert 8 * eight.memory.parameters == one.memory.parameters + 7 * vectors
    gathered = eight.collectives["all-gather"].bytes
    assert gathered == one.memory.parameters - vectors
    assert eight.collectives["reduce-scatter"].bytes * 8 == gathered + 4 * MODEL.vocab_size * 64


def test_less_is_kept_of_layers_that_are_computed_again():
    steps = {
        kind: plan(run_of(layers=4, remat=kind), devices=8).steps["every step"]
        for kind in ("none", "dots", "full")
    }
    kept = [step.memory.activations for step in steps.values()]
    assert kept == sorted(kept, reverse=True) and kept[2] < kept[0] / 2
    again = steps["full"].flops / steps["none"].flops
    assert 1.2 < again < 4 / 3


def test_a_plan_is_of_the_precision_that_a_run_has():
    """As if the model's own dtype were set."""
    runs = [
        dataclasses.replace(run_of(dtype=dtype), precision=precision)
        for dtype, precision in [
            ("float32", "bfloat16"),
            ("bfloat16", "auto"),
            ("bfloat16", "float32"),
            ("float32", "auto"),
        ]
    ]
    asked, own, wide, default = (plan(run, devices=8) for run in runs)
    assert asked.steps == own.steps and asked.config.model.dtype == "bfloat16"
    assert wide.steps == default.steps
    narrow, full = (p.steps["every step"].memory for p in (asked, wide))
    assert narrow.activations < full.activations and narrow.parameters == full.parameters


@pytest.mark.parametrize(("words", "said"), [([], True), (["--precision", "bfloat16"], False)])
def test_a_plan_in_float32_says_what_a_gpu_would_take(words, said, capsys):
    plan_command.command(["tiny", "adamw", "--devices", "8", *words])
    text = capsys.readouterr().out
    assert ("add --precision bfloat16" in " ".join(text.split())) == said
    assert ("bfloat16, xla attention" in " ".join(text.split())) != said


def test_chunks_hold_fewer_logits():
    run = run_of()
    whole, parts = (
        plan(dataclasses.replace(run, loss_chunk=n), devices=8).steps["every step"].memory.loss
        for n in (0, 16)
    )
    assert whole == 2 * 4 * (32 // 8) * 64 * 512 and parts == whole / 4


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (MeshConfig(fsdp=3), 8, "does not use 8 devices exactly"),
        (FSDP, 256, r"jax has started with 8 CPU devices.*python -m train plan"),
        (FSDP, -1, "at least 1 with --devices"),
    ],
)
def test_a_plan_that_cannot_be_says_why(mesh, devices, message):
    with pytest.raises(ValueError, match=message):
        plan(run_of(mesh=mesh), devices=devices)


def test_devices_that_jax_has_are_given():
    assert fake_devices(3) == jax.devices("cpu")[:3]


def test_tables_have_every_figure():
    console = Console(width=100, record=True, file=io.StringIO())
    figures = plan(run_of("sophia-g", optim={"groups": 0, "batch_fraction": 0.5}), devices=8)
    report.show(figures, console, peak_tflops=100.0)
    text = console.export_text()
    for word in (*report.LABELS.values(), "reduce-scatter", "plain", "curvature", "40% MFU"):
        assert word in text, word
    assert f"{figures.tokens_per_second(1e14):,.0f}" in text


@pytest.mark.parametrize(
    ("optimizer", "optim", "cure"),
    [
        ("sophia-g", {"groups": 0, "batch_fraction": 0.5}, {}),
        ("sophia-g", {"groups": 1, "batch_fraction": 1 / 8}, {}),
        ("sophia-g", {"groups": 0, "batch_fraction": 1 / 8}, {"batch_fraction": 0.25}),
        ("sophia-g", {"groups": 4, "batch_fraction": 1 / 8}, {"batch_fraction": 0.25, "groups": 0}),
        ("sophia-g", {"groups": 2, "batch_fraction": 1 / 4}, {"groups": 0}),
        (
            "sophia-g",
            {"groups": 0, "batch_fraction": 1 / 4, "amortize": True, "update_interval": 2},
            {"batch_fraction": 0.5},
        ),
        ("sophia-h", {"groups": 4}, {}),
        ("sophia-h", {"groups": 8, "batch_fraction": 0.5}, {"groups": 2}),
        ("adamw", {}, {}),
    ],
)
def test_samples_that_leave_devices_waiting_are_pointed_out(optimizer, optim, cure):
    """What is said to be better leaves none waiting."""
    console = Console(width=200, file=io.StringIO())
    report.show(plan(run_of(optimizer, optim=optim), devices=8), console)
    (said,) = re.findall(r".* (?:wait|waiting)\b.*", console.file.getvalue()) or [""]
    assert bool(said) == bool(cure)
    for name, value in cure.items():
        assert re.search(rf"--optim.{name.replace('_', '-')} {value}\b", said)
    better = plan(run_of(optimizer, optim=optim | cure), devices=8)
    assert better.idle == ""


def test_the_command_plans_for_devices_that_are_not_there():
    command = [sys.executable, "-m", "train", "plan", "gpt2-30m", "sophia-g", "--mesh.fsdp", "8"]
    command += ["--devices", "240", "--peak-tflops", "989.4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on 240 devices" in done.stdout and "data 30 x fsdp 8" in done.stdout
    waiting = "192 of 240 devices wait while 48 rows are sampled: --optim.batch-fraction 0.5"
    assert waiting in " ".join(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "fraction", "accumulation"), [(FSDP, 1 / 16, 1), (MeshConfig(data=8), 1 / 8, 2)]
)
def test_a_sample_of_fewer_rows_than_devices(mesh, fraction, accumulation):
    """A row a device, most of them idle: the parameters come once more, their squares go once."""
    run = run_of("sophia-g", mesh, {"groups": 0, "batch_fraction": fraction})
    run = dataclasses.replace(run, accumulation=accumulation)
    step = plan(run, devices=8, compile=True).steps["curvature"]
    assert step.compiled
    ours, theirs = step.on_cpu, step.compiled.collectives
    if "all-gather" in ours:
        gathers_as(theirs["all-gather"], ours["all-gather"])
    assert ours["all-reduce"].bytes == pytest.approx(theirs["all-reduce"].bytes, rel=0.02)
    assert sum(c.bytes for kind, c in theirs.items() if kind not in ours) < 50_000  # tokens
    assert step.memory.total == pytest.approx(step.compiled.total, rel=0.15)
    assert step.flops == pytest.approx(step.compiled.flops, rel=0.1)
