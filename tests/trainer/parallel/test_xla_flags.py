"""Options that a version of XLA lacks are left out and named; they end no process."""

import os
import subprocess
import sys

import jax
import pytest
from places import ROOT

from train.parallel import xla_flags

pytestmark = pytest.mark.newest
LEVEL = "xla_backend_optimization_level"


def test_the_unknown_are_left_out_and_named(capfd):
    assert xla_flags.known({LEVEL: 1, "xla_no_such": 3, "xla_nor_this": True}) == {LEVEL: 1}
    said = capfd.readouterr().err
    assert "does not know xla_no_such, xla_nor_this" in said and LEVEL not in said


def test_a_process_starts_with_what_was_added():
    code = f"""
import os
from train.parallel import xla_flags
xla_flags.add({{"xla_force_host_platform_device_count": 3, "xla_no_such": True}})
xla_flags.add({{"{LEVEL}": 0}})
import jax
print(jax.device_count(), os.environ["XLA_FLAGS"])
"""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert out.stdout.split() == ["3", "--xla_force_host_platform_device_count=3", f"--{LEVEL}=0"]


def test_flags_of_the_user_are_not_tried(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    assert xla_flags.flags({LEVEL: 2}) == f"--{LEVEL}=2"


def test_where_xla_does_not_start_nothing_is_set(monkeypatch, capfd):
    monkeypatch.setattr(xla_flags, "_START", "raise SystemExit(1)")
    assert xla_flags.flags({LEVEL: 0, "xla_other": 7}) == ""
    assert f"does not know {LEVEL}, xla_other" in capfd.readouterr().err


@pytest.mark.parametrize("options", [xla_flags.QUICK, xla_flags.PATIENT])
def test_known_options_are_taken_by_the_compiler(options):
    known = xla_flags.known(options)
    assert known and jax.jit(lambda x: 2 * x, compiler_options=known)(3) == 6
