"""Eight fake CPU devices for every test, fixed before jax starts."""

import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from train.parallel import xla_flags

# Compiling is what the tests wait for.
xla_flags.add({"xla_force_host_platform_device_count": 8} | xla_flags.QUICK | xla_flags.PATIENT)

# A program that several tests use is compiled once in each process. Processes share no folder: JAX
# writes files that others may read half-written.
COMPILED = tempfile.mkdtemp(prefix="compiled-")
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

jax.devices()  # so that no test starts it with fewer: `train.plan.plan.fake_devices` may

collect_ignore = ["support"]


def pytest_sessionfinish():
    """Deletes the compiled programs."""
    shutil.rmtree(COMPILED, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """On the newest JAX one row of the contract stands for the rows that share its factory."""
    if not str(config.option.markexpr).startswith("newest"):
        return
    from contract import VARIANTS

    rows = [
        item for item in items if getattr(getattr(item, "callspec", None), "id", "") in VARIANTS
    ]
    config.hook.pytest_deselected(items=rows)
    items[:] = [item for item in items if item not in rows]


def pytest_addoption(parser):
    """How much of tests/trainer/data/test_fuzz.py is run."""
    parser.addoption("--fuzz", type=int, default=300, help="damaged files to read")
    parser.addoption("--fuzz-seed", type=int, default=0, help="of how they are damaged")
