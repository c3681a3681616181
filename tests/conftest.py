"""Eight fake CPU devices for every test, fixed before jax starts."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else another process of these tests has it
    folder = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

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
