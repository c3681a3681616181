"""Eight fake CPU devices for every test, fixed before jax starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Compiling is what the tests wait for.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Eight devices on two busy cores: XLA gives up on a slow all-reduce after 40 s.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)

import jax

jax.devices()  # so that no test starts it with fewer: `train.plan.fake_devices` may

collect_ignore = ["kills.py", "stops.py", "two_processes.py"]  # programs of their own
