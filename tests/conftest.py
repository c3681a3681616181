"""Eight fake CPU devices for every test, fixed before jax starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from train.parallel import xla_flags

# Compiling is what the tests wait for.
xla_flags.add({"xla_force_host_platform_device_count": 8} | xla_flags.QUICK | xla_flags.PATIENT)

jax.devices()  # so that no test starts it with fewer: `train.plan.plan.fake_devices` may

collect_ignore = ["support"]


def pytest_addoption(parser):
    """How much of tests/trainer/data/test_fuzz.py is run."""
    parser.addoption("--fuzz", type=int, default=300, help="damaged files to read")
    parser.addoption("--fuzz-seed", type=int, default=0, help="of how they are damaged")
