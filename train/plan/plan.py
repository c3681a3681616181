"""What a run needs, before anything is allocated: `python -m train plan gpt2-770m sophia-g`.

Figures by hand come from shapes alone, at once; with `--compile` XLA's own stand beside them, of
the run's programs compiled for as many fake CPU devices, and never run.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import tyro

from train.config.schema import Config, resolved
from train.optimizers.registry import refresh_due
from train.optimizers.sophia import SophiaG, SophiaH
from train.parallel import xla_flags
from train.parallel.mesh import row_devices
from train.plan import collectives as traffic
from train.plan import hlo, memory
from train.plan.flops import model_flops
from train.plan.hlo import Collective
from train.plan.step_flops import curvature_flops, step_flops
from train.program import Program, assemble

NAMES = {False: "plain", True: "curvature", None: "every step"}


class Compiled(NamedTuple):
    """XLA's figures of a program, on one device."""

    arguments: int
    temporaries: int
    total: int
    flops: float  # the body of a loop once
    collectives: dict[str, Collective]
    seconds: float  # that compiling took


class Step(NamedTuple):
    """One program: of plain steps, or of those that sample curvature."""

    memory: memory.Memory  # bytes on one device
    flops: float  # products of matrices alone, on one device
    collectives: dict[str, Collective]  # of one device, where gradients are summed where kept
    on_cpu: dict[str, Collective]  # the same where they are summed everywhere, as XLA does there
    compiled: Compiled | None


class Plan(NamedTuple):
    """What a run needs on a mesh; see `plan`."""

    config: Config
    mesh: dict[str, int]  # devices of each axis
    parameters: int
    steps: dict[str, Step]  # "plain" and "curvature", or "every step"
    interval: int  # steps between two that sample curvature; 1 without any
    flops_per_token: float  # of loss and gradient: what MFU is a share of

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def row_devices(self) -> int:
        """Over which rows are spread."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def curvature(self) -> float:
        """Operations that samples add, as a share of all steps without."""
        plain = self.config.batch_size * self.config.sequence_length * self.flops_per_token
        return curvature_flops(self.config, self.row_devices) / plain / self.interval

    def tokens_per_second(self, peak: float, mfu: float = 0.4) -> float:
        """Of all devices, each of which could do `peak` operations a second and does a share."""
        return self.devices * peak * mfu / (self.flops_per_token * (1 + self.curvature))


def plan(config: Config, *, devices: int = 0, compile: bool = False) -> Plan:
    """What a run needs on so many devices, which need not exist.

    Args:
      config: its config. Precision "auto" is planned as on CPU.
      devices: their number; 0 for the fewest that the mesh needs.
      compile: also compile the programs, and read what XLA says of them.

    Raises:
      ValueError: the mesh does not fit the devices, or the run not the mesh; jax has started with
        fewer devices.

    >>> from train.config.presets import preset
    >>> figures = plan(preset("tiny", "adamw"), devices=1)
    >>> figures.parameters, figures.steps["every step"].memory.optimizer
    (119104, 952844)
    """
    config = resolved(config, "cpu")
    least = max(config.mesh.fsdp * config.mesh.tensor * max(config.mesh.data, 1), 1)
    program = assemble(config, fake_devices(devices or least))
    mesh = jax.tree.leaves(program.abstract)[0].sharding.mesh
    kinds = dict.fromkeys(refresh_due(config.optim, step) for step in (1, 0))
    interval = config.optim.update_interval if isinstance(config.optim, SophiaG | SophiaH) else 1
    return Plan(
        config=config,
        mesh=dict(mesh.shape),
        parameters=sum(x.size for x in jax.tree.leaves(program.abstract.params)),
        steps={NAMES[kind]: _step(config, program, mesh, kind, compile) for kind in kinds},
        interval=interval if len(kinds) > 1 else 1,
        flops_per_token=model_flops(config.model, 1, config.sequence_length)
        / config.sequence_length,
    )


def _step(config: Config, program: Program, mesh: Any, refresh: bool | None, compile: bool) -> Step:
    shapes = config, program.abstract, mesh, refresh is not False
    flops = step_flops(config)
    if refresh is not False:
        flops += curvature_flops(config, row_devices(mesh))
    return Step(
        memory.memory(*shapes),
        flops / mesh.size,
        traffic.collectives(*shapes),
        traffic.collectives(*shapes, scatter=False),
        compiled(program, refresh) if compile else None,
    )


def compiled(program: Program, refresh: bool | None) -> Compiled:
    """What XLA says of a program: its memory, operations and collectives, on one device."""
    start = time.perf_counter()
    # For speed alone: what a program needs is decided before code is made of it.
    executable = program.compile(refresh, options=xla_flags.known(xla_flags.QUICK))
    seconds = time.perf_counter() - start
    used = executable.memory_analysis()
    new = used.output_size_in_bytes - used.alias_size_in_bytes
    return Compiled(
        used.argument_size_in_bytes,
        used.temp_size_in_bytes,
        used.argument_size_in_bytes + used.temp_size_in_bytes + new,
        executable.cost_analysis()["flops"],
        hlo.collectives(executable.as_text()),
        seconds,
    )


def fake_devices(number: int) -> list[Any]:
    """So many CPU devices, of which jax then has no others; nothing is allocated on them.

    Raises:
      ValueError: `number` is less than one, or jax has looked for devices and found fewer.
    """
    if number < 1:
        raise ValueError(f"a plan for {number} devices: choose at least 1 with --devices.")
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:  # jax has started
        found = jax.devices("cpu")
        if len(found) < number:
            raise ValueError(
                f"jax has started with {len(found)} CPU devices, a plan for {number} needs as many "
                "fake ones. Run it in a process of its own, `python -m train plan ...`, or call "
                f'`jax.config.update("jax_num_cpu_devices", {number})` before jax is first used.'
            ) from None
        return found[:number]
    jax.config.update("jax_platforms", "cpu")  # a plan takes no memory of a GPU
    return jax.devices("cpu")


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command `plan` alone."""

    devices: int = 0
    """How many devices; 0 for the fewest that --mesh.* need."""
    compile: bool = False
    """Also compile the programs for fake CPU devices, and compare XLA's figures."""
    peak_tflops: float | None = None
    """Peak of a device, for tokens a second; by default those of known chips."""

    def __post_init__(self):
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"--peak-tflops {self.peak_tflops} must be above 0.")


def options(args: Sequence[str]) -> tuple[Options, list[str]]:
    """The command's own flags, and the words that are left to name a run.

    Raises:
      ValueError: a flag has a value that makes no sense.

    >>> options(["tiny", "--devices", "64", "--mesh.fsdp", "8"])[1]
    ['tiny', '--mesh.fsdp', '8']
    """
    return tyro.cli(Options, args=args, prog="python -m train plan", return_unknown_args=True)
