"""What a run needs, before anything is allocated: `python -m train plan gpt2-770m sophia-g`.

Estimates come from shapes alone, at once. With `--compile` the run's programs are compiled for fake
CPU devices, never run, and XLA's own figures stand beside the estimates.
"""

import math
import time
from typing import Any, NamedTuple

import jax

from train.config.schema import Config, resolved
from train.optimizers.base import Due
from train.parallel import xla_flags
from train.parallel.mesh import row_devices
from train.plan import collectives, hlo, memory
from train.plan.flops import model_flops
from train.plan.hlo import Collective
from train.plan.step_flops import curvature_flops, step_flops
from train.program import Program, assemble


class Compiled(NamedTuple):
    """XLA's figures of a program, on one device."""

    arguments: int
    temporaries: int
    total: int
    flops: float  # a loop's body counts once
    collectives: dict[str, Collective]
    seconds: float  # of compilation


class Step(NamedTuple):
    """One program: the plain step, or the step that samples curvature."""

    memory: memory.Memory  # bytes on one device
    flops: float  # of matrix products, on one device
    collectives: dict[str, Collective]  # of one device; gradients are reduce-scattered
    on_cpu: dict[str, Collective]  # the same; gradients are all-reduced, as XLA does on CPU
    compiled: Compiled | None


class Plan(NamedTuple):
    """What a run needs on a mesh; see `plan`."""

    config: Config
    mesh: dict[str, int]  # devices of each axis
    parameters: int
    steps: dict[str, Step]  # "plain" and "curvature" or "roots", else "every step"
    interval: int  # steps between refreshes of curvature
    flops_per_token: float  # of loss and gradient, the numerator of MFU
    curvature_flops: float  # of one sample, over all devices
    idle: str  # advice if devices wait while curvature is sampled

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def row_devices(self) -> int:
        """Devices over which rows are spread."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def curvature(self) -> float:
        """FLOPs of curvature samples over the FLOPs of plain steps, averaged over an interval."""
        plain = self.config.batch_size * self.config.sequence_length * self.flops_per_token
        return self.curvature_flops / plain / self.interval

    def tokens_per_second(self, peak: float, mfu: float = 0.4) -> float:
        """Throughput of all devices together.

        Args:
          peak: FLOP/s of one device.
          mfu: fraction of the peak that is reached.
        """
        return self.devices * peak * mfu / (self.flops_per_token * (1 + self.curvature))


def plan(config: Config, *, devices: int = 0, compile: bool = False) -> Plan:
    """What a run needs on a number of devices, which need not exist.

    Args:
      config: of the run. Precision "auto" is planned as on CPU.
      devices: number of devices; 0 for the fewest that the mesh needs.
      compile: also compile the programs and read XLA's figures.

    Raises:
      ValueError: the mesh does not fit the devices, or the run does not fit the mesh; jax has
        started with fewer devices.

    >>> from train.config.presets import preset
    >>> figures = plan(preset("tiny", "adamw"), devices=1)
    >>> figures.parameters, figures.steps["every step"].memory.optimizer
    (119104, 952844)
    """
    config = resolved(config, "cpu")
    least = max(config.mesh.fsdp * config.mesh.tensor * max(config.mesh.data, 1), 1)
    program = assemble(config, fake_devices(devices or least))
    mesh = jax.tree.leaves(program.abstract)[0].sharding.mesh
    optimizer, rows_over = program.optimizer, row_devices(mesh)
    sampling, context = optimizer.sampling, config.context(rows_over)
    intervals = optimizer.refresh_interval, optimizer.renew_interval
    kinds = dict.fromkeys(map(optimizer.due, (1, *intervals, 0)))
    return Plan(
        config=config,
        mesh=dict(mesh.shape),
        parameters=sum(x.size for x in jax.tree.leaves(program.abstract.params)),
        steps={_label(kind): _step(config, program, mesh, kind, compile) for kind in kinds},
        interval=optimizer.refresh_interval,
        flops_per_token=model_flops(config.model, 1, config.sequence_length)
        / config.sequence_length,
        curvature_flops=curvature_flops(config, sampling, rows_over),
        idle=config.optim.idle(context, sampling) if sampling else "",
    )


def _label(due: Due) -> str:
    """Name of a kind of step in tables."""
    if True in due:
        return " and ".join(name for name, x in zip(("curvature", "roots"), due, strict=True) if x)
    return "plain" if False in due else "every step"


def _step(config: Config, program: Program, mesh: Any, due: Due, compile: bool) -> Step:
    sampling = None if due.refresh is False else program.optimizer.sampling
    shapes = config, program.abstract, mesh, sampling
    flops = step_flops(config) + curvature_flops(config, sampling, row_devices(mesh))
    return Step(
        memory.memory(*shapes),
        flops / mesh.size,
        collectives.collectives(*shapes),
        collectives.collectives(*shapes, scatter=False),
        compiled(program, due) if compile else None,
    )


def compiled(program: Program, due: Due) -> Compiled:
    """XLA's figures of a program on one device."""
    start = time.perf_counter()
    # Faster compilation: memory and collectives are decided before code generation.
    executable = program.compile(due, options=xla_flags.known(xla_flags.QUICK))
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
    """Fake CPU devices; jax sees no other devices then, and nothing is allocated on them.

    Raises:
      ValueError: `number` is less than one, or jax has started with fewer devices.
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
