"""Several processes: how they are found, and that two of them train what one does."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from places import ROOT, SUPPORT

from benchmarks.mesh_equality import free_port
from train import loop
from train.cli.train import parse
from train.logging import jsonl
from train.parallel import processes
from train.parallel.mesh import MeshConfig
from train.parallel.processes import DistributedConfig, _arguments

WORDS = """tiny adamw --data.heldout-fraction .003
--model.width 16 --model.layers 1 --model.heads 2 --model.context 16
--batch-size 16 --sequence-length 16 --steps 8 --warmup-steps 2 --evaluate-every 8
--output.checkpoint-every 4 --output.log-every 1 --output.sample-length 20"""


def test_one_process_is_the_default():
    assert _arguments(DistributedConfig(), {}) is None
    assert _arguments(DistributedConfig(), {"SLURM_NTASKS": "8"}) is None  # salloc without srun
    assert _arguments(DistributedConfig(), {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_flags_come_before_the_environment_and_the_cluster_fills_what_is_left():
    environ = {"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
    wanted = {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}
    assert _arguments(DistributedConfig(), environ) == wanted
    assert _arguments(DistributedConfig("b:2", 2, 0), environ) == {
        "coordinator_address": "b:2",
        "num_processes": 2,
        "process_id": 0,
    }
    empty = dict.fromkeys(wanted)
    assert _arguments(DistributedConfig(), {"SLURM_STEP_NUM_TASKS": "2"}) == empty
    assert _arguments(DistributedConfig(), {"OMPI_COMM_WORLD_SIZE": "2"}) == empty
    assert _arguments(DistributedConfig(automatic=True), {}) == empty


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistributedConfig(processes=2, process=1), "add --distributed.coordinator HOST:PORT"),
        (DistributedConfig(coordinator="host"), "'host' has no port"),
    ],
)
def test_half_a_description_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        processes.start(config, {})


def test_one_process_agrees_with_itself():
    agree = processes.Agreement()
    assert agree(True, False) == (True, False)
    assert processes.from_main("text") == "text"
    processes.check_same({"a": 1})
    with pytest.raises(KeyError):
        processes.on_main(lambda: {}[0])


def test_an_error_without_words_is_announced_too(monkeypatch):
    announced = []
    monkeypatch.setattr(processes, "_gather", lambda text: announced.append(text) or [text])

    def fail():
        raise AssertionError

    with pytest.raises(AssertionError):
        processes.on_main(fail)
    assert announced == ["AssertionError()"]


def test_where_one_process_fails_all_raise(monkeypatch):
    assert processes.on_all(lambda: 3) == 3
    with pytest.raises(KeyError):
        processes.on_all(lambda: {}[0])
    monkeypatch.setattr(processes, "_gather", lambda text: [text, "no data here"])
    with pytest.raises(ValueError, match="process 1 failed: no data here"):
        processes.on_all(lambda: 3)


def start(words, what, at, port, process):
    job = json.dumps({"words": words, "what": what, "at": at})
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "COORDINATOR_ADDRESS": f"localhost:{port}",
        "NUM_PROCESSES": "2",
    }
    return subprocess.Popen(
        [sys.executable, str(SUPPORT / "two_processes.py"), job],
        env=environment | {"PROCESS_ID": str(process)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(history):
    return {r["step"]: [r[n] for n in ("loss", "grad_norm")] for r in history if "loss" in r}


def test_two_processes_train_what_one_does_and_stop_together(tmp_path):
    """Two of four devices, fsdp 4; process 1 alone is told to stop; one of eight goes on."""
    folder, words = tmp_path / "two", [*WORDS.split(), "--mesh.fsdp", "4"]
    port = free_port()
    words_two = [
        *words,
        "--output.folder",
        str(folder),
        "--output.compile-cache",
        str(tmp_path / "xla"),
    ]
    both = [start(words_two, "stop", 4, port, i) for i in range(2)]
    texts = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    outs = [out for out, _ in texts]
    for i, out in enumerate(outs):
        assert f"END process {i} of 2" in out
        assert "DISAGREE" in out and "process 1: optim.gamma 0.05 -> 1.05" in out
        assert "FAILED" in out and "no space" in out
    assert "ALONE process 1 failed: no data here" in outs[0] and "ALONE no data here" in outs[1]
    step = max(losses(jsonl.read_history(folder)))
    assert 4 <= step < 8
    assert f"stopped at step {step} of 8" in outs[0]
    assert "step" not in outs[1].partition("FAILED")[2]  # process 0 alone prints
    mesh = MeshConfig(fsdp=2)
    resumed = loop.resume(folder, mesh=mesh, compile_cache="")
    assert any((folder / "checkpoints" / str(step)).iterdir())
    one = loop.train(
        parse([*words, "--output.folder", str(tmp_path / "one"), "--output.compile-cache", ""])
    )
    a, b = losses(resumed), losses(one)
    assert list(a) == list(b) == list(range(1, 9))
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_where_one_process_fails_none_waits_and_the_run_can_go_on(tmp_path):
    """JAX would wait five minutes at the exit of the one for the other, which waits for it."""
    folder, port = tmp_path / "two", free_port()
    words = [*WORDS.split(), "--output.folder", str(folder), "--output.checkpoint-every", "2"]
    words += ["--output.compile-cache", ""]
    both = [start(words, "fail", 5, port, i) for i in range(2)]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert all(process.returncode for process in both), errors
    assert "error: the disk of process 1 is gone" in errors[1]
    assert "another process failed before" in errors[0]
    assert any((folder / "checkpoints" / "4").iterdir())  # which the run goes on from
    steps = [row["step"] for row in loop.resume(folder, compile_cache="") if "loss" in row]
    assert steps == list(range(1, 9))
    assert not list(folder.glob("metrics-*"))  # it did not begin again
