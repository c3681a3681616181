"""The benchmark for a GPU, run on CPU: floors, derived figures, and processes that fail."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from places import ROOT

from benchmarks import curvature_cost, gpu
from models import PRESETS
from train.plan.flops import peak_flops

SHALLOW = dataclasses.replace(PRESETS["tiny"], layers=1)


@pytest.mark.parametrize("name", gpu.UPDATES)
def test_the_floor_counts_what_an_update_must_read_and_write(name):
    """Parameters and state are read and written, gradient and sample read; plain steps read h."""
    tx, _, sampled, floor = gpu.UPDATES[name]
    params = {"w": jax.ShapeDtypeStruct((768, 3072), jnp.float32)}
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    size = params["w"].size
    state = round(sum(x.size * x.dtype.itemsize for x in leaves) / size)
    unwritten = 4 if name == "sophia-g" else 0
    assert floor == 3 * 4 + 4 * sampled + 2 * state - unwritten


def test_figures_are_related_to_bandwidth_peak_and_plain_step():
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
def test_the_peak_comes_from_the_flag_or_the_device(kind, teraflops):
    assert peak_flops(kind, None) == (teraflops and pytest.approx(1e12 * teraflops))
    assert peak_flops(kind, 500) == 5e14


def in_this_process(case, argv, timeout):
    row = gpu.measure(case, gpu.Size(SHALLOW, 8, 2**10, 1, 1))
    return json.loads(json.dumps(row))


def test_a_failed_measurement_is_reported_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    def out_of_memory(params):
        raise MemoryError("4 GiB too much")

    broken = optax.GradientTransformation(out_of_memory, optax.identity().update)
    monkeypatch.setitem(gpu.STEPS, "adamw", (curvature_cost.Sampler(broken), False))
    monkeypatch.setattr(gpu, "in_own_process", in_this_process)
    path = tmp_path / "gpu.json"
    cases = ["step adamw", "step sophia-g", "step sophia-g, sample of 1/8"]
    with pytest.raises(SystemExit, match="1 of 4 measurements failed"):
        gpu.main(["--small", "--cases", *cases, "--json", str(path)])
    out, rows = capsys.readouterr().out, json.loads(path.read_text())
    assert "step adamw failed: MemoryError: 4 GiB too much" in out
    assert rows["step sophia-g"]["tokens_per_second"] > 0
    assert "overhead" in rows["step sophia-g, sample of 1/8"]


@pytest.mark.parametrize(
    ("executable", "timeout", "message"),
    [("/bin/false", 60, "the process ended with 1"), (sys.executable, 0.01, "no result after 0 s")],
)
def test_a_process_that_dies_or_hangs_gives_a_message(executable, timeout, message, monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", executable)
    assert message in gpu.in_own_process("copy", ["--small"], timeout)["error"]


def test_full_size_without_a_gpu_is_rejected(monkeypatch):
    monkeypatch.setattr(gpu, "in_own_process", in_this_process)
    with pytest.raises(SystemExit, match=r"found no GPU, only cpu: .* or pass --small"):
        gpu.main([])


def test_the_script_names_the_device_and_has_no_mfu_on_cpu(tmp_path):
    script, path = ROOT / "benchmarks" / "gpu.sh", tmp_path / "gpu.json"
    command = [script, "--small", "--cases", "update sophia-g", "--json", path]
    environment = os.environ | {"PYTHON": sys.executable, "COLUMNS": "105"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Ran on cpu (cpu)" in done.stdout and "No MFU" in done.stdout
    rows = json.loads(path.read_text())
    assert rows["update sophia-g"]["over_floor"] > 0
    assert rows["copy"]["bytes_per_second"] > 1e8


def test_a_step_needs_no_library_of_the_command_line_or_of_data(tmp_path):
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
