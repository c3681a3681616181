"""What the benchmarks of cost claim: counts against formulas, fits against known laws."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from places import ROOT

from benchmarks import curvature_cost, gpu, scaling
from models import PRESETS, DecoderConfig
from train.plan.flops import peak_flops
from train.plan.hlo import collectives

PAPER = {"rows": 480, "length": 1024}
SHALLOW = dataclasses.replace(PRESETS["tiny"], layers=1)


# ---------------------------------------------------------------- curvature_cost


@functools.cache
def paper_step(model, refresh):
    """XLA's count of a step at the paper's batch, with or without an eighth of the rows sampled."""
    sampler = curvature_cost.gauss_newton(8)
    return curvature_cost.flops(curvature_cost.lower(PRESETS[model], sampler, refresh, **PAPER))


@pytest.mark.parametrize("model", ["gpt2-30m", "gpt2-125m"])
def test_xla_counts_a_plain_step_as_the_formula_does(model):
    by_hand = curvature_cost.model_flops(PRESETS[model], **PAPER)
    assert paper_step(model, False) == pytest.approx(by_hand, rel=0.02)


@pytest.fixture(scope="module")
def operations():
    """Of two layers: what is claimed holds at any depth, and lowering takes time by layers."""
    config = dataclasses.replace(PRESETS["gpt2-30m"], layers=2)
    return curvature_cost.operations(config, 480, 1024, (1, 8))


@pytest.mark.parametrize(("share", "n"), [("all rows", 1), ("1/8", 8)])
def test_a_sample_costs_two_thirds_of_the_plain_step_of_its_rows(operations, share, n):
    """One more backward pass of them, that is twice a forward pass, which is shared."""
    row = operations[f"Sophia-G, {share}"]
    assert row["plain_steps"] - 1 == pytest.approx(2 / 3 / n, rel=0.02)


def test_at_the_papers_batch_an_eighth_of_the_rows_each_ten_steps_adds_under_a_percent():
    plain, refresh = (paper_step("gpt2-125m", x) for x in (False, True))
    assert 0.005 < curvature_cost.amortized(refresh, plain, 10) <= 0.01


def test_groups_cost_no_operations(operations):
    one, four = (operations[f"Sophia-G, all rows{groups}"] for groups in ("", ", 4 groups"))
    assert four["flops"] == pytest.approx(one["flops"], rel=1e-3)


def test_a_hessian_vector_product_of_all_rows_each_ten_steps_adds_a_fifth(operations):
    """Forward over reverse: each of three units of a gradient, and its derivative twice that."""
    assert operations["Sophia-H, all rows"]["overhead_at_10"] == pytest.approx(0.2, rel=0.01)
    eighth = operations["Sophia-H, 1/8"]["plain_steps"] - 1
    assert 2 / 8 < eighth < 3 / 8


def test_an_overhead_is_spread_over_the_interval():
    assert curvature_cost.amortized(15.0, 10.0, 1) == pytest.approx(0.5)
    assert curvature_cost.amortized(15.0, 10.0, 20) == pytest.approx(0.025)


def test_a_step_that_samples_by_itself_is_taken_apart_by_whether_one_was_due():
    times = {"plain": [1.0, 2.0, 1.0, 2.0], "lax.cond": [2.0, 6.0, 2.0, 6.0]}
    figures = curvature_cost.in_plain_steps(times)
    assert figures["lax.cond, no sample due"]["plain_steps"] == 2
    assert figures["lax.cond, 1/8"]["plain_steps"] == 3
    assert figures["plain"] == {"plain_steps": 1, "seconds": 1.5}


@pytest.mark.slow
def test_curvature_cost_counts_compiles_runs_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", SHALLOW)
    path = tmp_path / "cost.json"
    sizes = ["--batch", "8", "--length", "64", "--time-batch", "8", "--rounds", "2"]
    models = ["--models", "tiny", "--compile", "tiny", "--time", "tiny"]
    curvature_cost.main([*models, *sizes, "--json", str(path)])
    out, result = capsys.readouterr().out, json.loads(path.read_text())
    assert "Sophia-H, 1/8" in out and "1/16" not in out, "16 does not divide 8 rows"
    programs = result["programs"]["tiny"]
    plain, refresh, one = (programs[x] for x in ("plain", "refresh, 1/8", "lax.cond, 1/8"))
    for figure in ("flops", "bytes"):
        assert plain[figure] < min(refresh[figure], one[figure])
    assert all(row["temporary_bytes"] > 1e6 for row in programs.values())
    assert one["flops"] > refresh["flops"], "an optimizer that samples by itself shares no pass"
    assert all(row["plain_steps"] > 0 for row in result["times"]["tiny"].values())


def test_a_batch_that_does_not_divide_into_groups_is_refused(capsys):
    with pytest.raises(SystemExit):
        curvature_cost.main(["--batch", "6"])
    assert "--batch 6 does not divide into 4 groups" in capsys.readouterr().err


# ---------------------------------------------------------------- scaling


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_the_exponent_is_that_of_a_power_law(power):
    figures = {str(n): {"seconds": 3e-9 * n**power} for n in (10, 1000, 10**6)}
    assert scaling.exponent(figures) == pytest.approx(power)
    figures["10"]["seconds"] *= 100
    assert scaling.exponent(figures, least=1000) == pytest.approx(power)
    assert scaling.exponent(figures, least=10**6) is None


def test_collectives_are_counted_with_the_bytes_of_their_results():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def talk(a, b):
        scattered = jax.lax.psum_scatter(a, "x", tiled=True)
        return jax.lax.psum(a, "x"), jax.lax.all_gather(b, "x"), scattered

    talk = jax.shard_map(talk, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    arguments = jnp.ones((8, 10)), jnp.ones(6, jnp.bfloat16)
    found = collectives(str(jax.jit(talk).lower(*arguments).compile().as_text()))
    assert found["all-reduce"] == (1, 8 * 10 * 4)
    assert found["reduce-scatter"] == (1, 2 * 10 * 4)
    assert found["all-gather"][0] == 1 and found["all-gather"][1] in (4 * 6 * 2, 4 * 6 * 4)


@pytest.mark.slow
def test_what_a_device_does_stays_flat_as_devices_and_rows_grow(monkeypatch):
    config = DecoderConfig(vocab_size=256, context=16, width=32, layers=1, heads=2)
    monkeypatch.setattr(scaling, "MODEL", config)
    monkeypatch.delitem(scaling.STEPS, "sample of all rows")
    figures = scaling.weak_scaling((2, 4))
    parameters = 256 * 32 + 16 * 32 + 12 * 32**2 + 3 * 32
    for layout in ("data", "fsdp"):
        for name in scaling.STEPS:
            two, four = (figures[f"{layout}, {name}, {n}"] for n in (2, 4))
            for figure in ("collectives", "collective_bytes"):
                assert four[figure] == two[figure] > 0, (layout, name)
            least = 0.95 if layout == "data" else 0.9  # a device's share of the update falls
            for figure in ("flops", "bytes"):
                assert least <= four[figure] / two[figure] <= 1.05, (layout, name)
            halved = 0.5 if layout == "fsdp" else 1
            state = two["argument_bytes"] * halved
            assert four["argument_bytes"] == pytest.approx(state, rel=0.1), (layout, name)
    moved = figures["data, plain, 4"]["collective_bytes"] / 4
    embedding = 256 * 32  # which may be reduced apart as a table and as a head
    assert parameters <= moved <= 1.01 * (parameters + embedding)


@pytest.mark.slow
def test_scaling_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "fake_devices", lambda: None)  # the tests have eight
    monkeypatch.setattr(scaling, "MODEL", dataclasses.replace(scaling.MODEL, layers=1, width=16))
    monkeypatch.setattr(scaling, "SIZES", (1e4, 1e5))
    monkeypatch.setattr(scaling, "STEPS", {"plain": scaling.STEPS["plain"]})
    path = tmp_path / "scaling.json"
    scaling.main(["--largest", "2e5", "--rounds", "1", "--devices", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    for figures in result["update_times"].values():
        assert list(figures) == ["8192", "98304", "196608"]
    assert result["weak_scaling"]["data, plain, 1"]["collectives"] == 0
    out = capsys.readouterr().out
    assert "exponent, all" in out and "exponent, from" not in out


# ---------------------------------------------------------------- gpu


@pytest.mark.parametrize("name", gpu.UPDATES)
def test_the_floor_is_what_an_update_must_read_and_write(name):
    """Parameters and state both ways, gradient and sample one; h is only read between refreshes."""
    tx, _, sampled, floor = gpu.UPDATES[name]
    params = {"w": jax.ShapeDtypeStruct((768, 3072), jnp.float32)}
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    size = params["w"].size
    state = round(sum(x.size * x.dtype.itemsize for x in leaves) / size)
    unwritten = 4 if name == "sophia-g" else 0
    assert floor == 3 * 4 + 4 * sampled + 2 * state - unwritten


def test_figures_are_put_in_relation_to_bandwidth_peak_and_plain_step():
    rows = {
        "copy": {"seconds": 1.0, "bytes_per_second": 100.0},
        "update adamw": {"seconds": 3.0, "bytes": 150.0},
        "step sophia-g": {"seconds": 2.0, "tokens": 50, "flops": 300.0},
        "step sophia-g, sample of 1/8": {"seconds": 3.0, "tokens": 50, "flops": 300.0},
        "step adamw": {"error": "RESOURCE_EXHAUSTED"},
    }
    gpu.complete(rows, peak=600.0)
    assert rows["update adamw"]["over_floor"] == 2
    assert rows["step sophia-g"]["tokens_per_second"] == 25
    assert rows["step sophia-g"]["mfu"] == 0.25
    assert rows["step sophia-g, sample of 1/8"]["overhead"] == pytest.approx(0.05)
    assert rows["step adamw"] == {"error": "RESOURCE_EXHAUSTED"}


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("cpu", None),
    ],
)
def test_the_peak_is_known_by_device_or_given(kind, teraflops):
    assert peak_flops(kind, None) == (teraflops and pytest.approx(1e12 * teraflops))
    assert peak_flops(kind, 500) == 5e14


def in_this_process(case, argv, timeout):
    row = gpu.measure(case, gpu.Size(SHALLOW, 8, 2**10, 1, 1))
    return json.loads(json.dumps(row))


def test_one_that_fails_leaves_the_others_and_its_message(tmp_path, monkeypatch, capsys):
    def out_of_memory(params):
        raise MemoryError("4 GiB more than there are")

    broken = optax.GradientTransformation(out_of_memory, optax.identity().update)
    monkeypatch.setitem(gpu.STEPS, "adamw", (curvature_cost.Sampler(broken), False))
    monkeypatch.setattr(gpu, "in_own_process", in_this_process)
    path = tmp_path / "gpu.json"
    cases = ["step adamw", "step sophia-g", "step sophia-g, sample of 1/8"]
    with pytest.raises(SystemExit, match="1 of 4 measurements failed"):
        gpu.main(["--small", "--cases", *cases, "--json", str(path)])
    out, rows = capsys.readouterr().out, json.loads(path.read_text())
    assert "step adamw failed: MemoryError: 4 GiB more than there are" in out
    assert rows["step sophia-g"]["tokens_per_second"] > 0
    assert "overhead" in rows["step sophia-g, sample of 1/8"]


@pytest.mark.parametrize(
    ("executable", "timeout", "message"),
    [("/bin/false", 60, "the process ended with 1"), (sys.executable, 0.01, "no result after 0 s")],
)
def test_a_process_that_dies_or_hangs_is_a_message_too(executable, timeout, message, monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", executable)
    assert message in gpu.in_own_process("copy", ["--small"], timeout)["error"]


def test_full_size_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(gpu, "in_own_process", in_this_process)
    with pytest.raises(SystemExit, match=r"found no GPU, only cpu: .* or pass --small"):
        gpu.main([])


def test_the_script_says_on_what_it_ran_and_has_no_mfu_of_a_cpu(tmp_path):
    script, path = ROOT / "benchmarks" / "gpu.sh", tmp_path / "gpu.json"
    command = [script, "--small", "--cases", "update sophia-g", "--json", path]
    environment = os.environ | {"PYTHON": sys.executable, "COLUMNS": "105"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Ran on cpu (cpu)" in done.stdout and "No MFU" in done.stdout
    rows = json.loads(path.read_text())
    assert rows["update sophia-g"]["over_floor"] > 0
    assert rows["copy"]["bytes_per_second"] > 1e8


def test_a_step_on_a_gpu_needs_neither_tyro_nor_grain(tmp_path):
    path = tmp_path / "row.json"
    missing = ("tyro", "grain", "tensorflow", "tensorflow_datasets", "matplotlib")
    argv = ["--small", "--case", "step sophia-g, sample of 1/8", "--json", str(path)]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); "
        f"from benchmarks import gpu; gpu.main({argv})"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    row = json.loads(path.read_text())
    assert row["tokens"] == 8 * 64 and np.isfinite(row["seconds"]), row
