"""One of the processes of test_processes.py: `python two_processes.py JOB` (JSON)."""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ""

import jax

from train import loop
from train.cli import main
from train.logging import throughput
from train.parallel import processes, xla_flags

xla_flags.add({"xla_force_host_platform_device_count": 4} | xla_flags.QUICK | xla_flags.PATIENT)
job = json.loads(sys.argv[1])


def disagree():
    """All processes raise, each the same, and none waits for ever."""
    try:
        processes.check_same({"optim": {"gamma": 0.05 + jax.process_index()}, "steps": 6})
    except ValueError as error:
        print(f"DISAGREE {error}", flush=True)

    def fail():
        raise OSError("no space")

    try:
        processes.on_main(fail)
    except (ValueError, OSError) as error:
        print(f"FAILED {error}", flush=True)

    def fail_alone():
        if jax.process_index() == 1:
            raise OSError("no data here")

    try:
        processes.on_all(fail_alone)
    except (ValueError, OSError) as error:
        print(f"ALONE {error}", flush=True)


def in_process_1(at, act):
    """Does this there, at this step."""
    report = throughput.Meter.report

    def reported(self, step, *args):
        if step == at and jax.process_index() == 1:
            act()
        report(self, step, *args)

    throughput.Meter.report = reported


def stop():
    os.kill(os.getpid(), 15)


def fail():
    raise OSError("the disk of process 1 is gone")


def checked(run):
    disagree()
    return train(run)


train, loop.train = loop.train, checked
if job["what"]:
    in_process_1(job["at"], {"stop": stop, "fail": fail}[job["what"]])
main.main(job["words"])
print(f"END process {jax.process_index()} of {jax.process_count()}", flush=True)
