"""Eight fake CPU devices for every test, fixed before jax starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from train import xla_flags

# Compiling is what the tests wait for.
xla_flags.add({"xla_force_host_platform_device_count": 8} | xla_flags.QUICK | xla_flags.PATIENT)

jax.devices()  # so that no test starts it with fewer: `train.plan.fake_devices` may

collect_ignore = ["kills.py", "stops.py", "two_processes.py"]  # programs of their own


def pytest_addoption(parser):
    """How much of tests/test_fuzz.py is run."""
    parser.addoption("--fuzz", type=int, default=300, help="damaged files to read")
    parser.addoption("--fuzz-seed", type=int, default=0, help="of how they are damaged")
