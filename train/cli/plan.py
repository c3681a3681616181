"""`python -m train plan`: what a run needs, without running it."""

import dataclasses
import math
from collections.abc import Sequence

import tyro
from rich.console import Console

from train.cli.train import parse
from train.plan.plan import plan
from train.plan.report import show

HELP = """What a run needs: memory, FLOPs and collectives, on devices that need not exist.

usage: python -m train plan [MODEL] [OPTIMIZER] [flags of a run] [options]

  --devices N        number of devices; default the fewest that --mesh.* need
  --compile          also compile the programs for fake CPU devices, and compare XLA's figures
  --peak-tflops X    peak of a device, for tokens a second; default a table of known chips

python -m train plan gpt2-770m sophia-g --mesh.fsdp 8 --devices 240 --precision bfloat16
"""


def command(args: Sequence[str]) -> None:
    """`python -m train plan [MODEL] [OPTIMIZER] [flags] [--devices N] [--compile]`."""
    if {"-h", "--help"} & set(args):
        print(HELP)
        return
    known, words = options(args)
    config, console = parse(words, "python -m train plan"), Console()
    figures = plan(config, devices=known.devices, compile=known.compile)
    show(figures, console, known.peak_tflops)
    if config.precision == "auto" and config.model.dtype != "bfloat16":
        console.print(
            f"These are figures in {config.model.dtype}; on GPU and TPU a run is in bfloat16 "
            "unless told otherwise: add --precision bfloat16."
        )


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
