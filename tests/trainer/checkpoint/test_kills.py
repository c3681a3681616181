"""A run that is killed and resumed is the run that was not killed, bit by bit."""

import json
import os
import subprocess
import sys

import pytest
from places import ROOT, SUPPORT

DRIVER = SUPPORT / "kills.py"


@pytest.mark.parametrize(
    ("kills", "optimizer"), [(3, "adamw"), pytest.param(12, "sophia-g", marks=pytest.mark.slow)]
)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(kills, optimizer, tmp_path):
    """Parameters, optimizer state and metrics.jsonl; all but tokens_per_second, which is timed."""
    command = [sys.executable, str(DRIVER), str(tmp_path), str(kills), optimizer]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    log = (tmp_path / "log.txt").read_text()
    assert result["step"] == 60 and result["arrays"] > 15, log
    assert result["same"] == {"state": True, "metrics": True}, log
    *killed, end = result["attempts"]
    assert end == ["end", 0], log
    wanted = {"term": 0}  # as a shell wants it after a signal that was obeyed
    assert [code for _, code in killed] == [wanted.get(moment, -9) for moment, _ in killed], log
    assert {"save", "line", "term"} <= {moment for moment, _ in killed}
    assert "stopped at step" in log and "python -m train resume" in log
