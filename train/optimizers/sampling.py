"""Which rows of a batch an optimizer samples curvature on, and in which groups."""

import abc
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Collection
from typing import Self

from sophia_optax.estimators.rows import check_fraction
from train.optimizers.base import OptimizerConfig, SamplingPlan, TrainContext


@dataclasses.dataclass(frozen=True)
class SamplesRows(OptimizerConfig):
    """What optimizers that sample curvature on some rows of the batch share."""

    update_interval: int = 10
    """Steps between samples of curvature."""
    amortize: bool = False
    """Sample 1 / update_interval of the rows at every step instead of all at an interval: all
    steps take equal time, and h averages as many steps, with more samples. Better if steps must
    keep time, or if a whole sample needs too much memory; worse if the update is a large part of a
    step, since an update then moves 44 bytes a parameter instead of 28."""
    batch_fraction: float = 1.0
    """Share of the batch that a sample is taken on: less is cheaper and noisier."""
    groups: int = 1
    """Groups of the sampled rows that are sampled apart, for less variance at equal cost, at least
    one a micro-batch; must divide the rows. 0 samples each row apart, for the least variance."""
    num_samples: int = 1
    """Draws averaged in one sample."""

    @abc.abstractmethod
    def plan(self, context: TrainContext) -> SamplingPlan:
        """How a step of the run samples curvature."""

    @property
    def slices(self) -> int:
        """Steps over which one sample is amortized."""
        return self.update_interval if self.amortize else 1

    def strides(self, batch_size: int, accumulation: int = 1) -> tuple[int, int]:
        """Strides of a sample over micro-batches and over the rows of each.

        Returns:
          (a, b): every a-th micro-batch is sampled, on every b-th of its rows. Their product is the
          stride over the batch, whatever the accumulation.

        Raises:
          ValueError: `batch_fraction` is not 1 / n, or the batch does not divide into the strides.
        """
        check_fraction(self.batch_fraction)
        if self.update_interval < 1:
            raise ValueError(
                f"--optim.update-interval {self.update_interval} must be at least 1, which samples "
                "at every step."
            )
        stride = round(1 / self.batch_fraction) * self.slices
        if batch_size % stride:
            over = f" amortized over {self.slices} steps" * self.amortize
            raise ValueError(
                f"batch_fraction={self.batch_fraction}{over} takes every {stride}-th row, which "
                f"does not divide batch_size={batch_size}. Choose a multiple of {stride} rows, or "
                f"another --optim.batch-fraction{' or --optim.update-interval' * self.amortize}."
            )
        if stride % accumulation and accumulation % stride:
            raise ValueError(
                f"accumulation={accumulation} cuts the batch into every {accumulation}-th row, "
                f"curvature is sampled on every {stride}-th: one must divide the other. Choose "
                f"--accumulation {stride} or a factor of it, or --optim.batch-fraction "
                f"{1 / accumulation:g}."
            )
        return min(stride, accumulation), max(stride // accumulation, 1)

    def groups_of(self, batch_size: int, accumulation: int) -> int:
        """Number of groups in each sampled micro-batch.

        Raises:
          ValueError: as `strides`, or the sampled rows do not divide into the groups.
        """
        every, stride = self.strides(batch_size, accumulation)
        rows = batch_size // (accumulation * stride)
        groups = math.ceil(self.groups * every / accumulation) or rows
        if not groups or rows % groups:
            raise ValueError(
                f"{rows} rows, sampled on each of {accumulation // every} micro-batches, do not "
                f"divide into {groups} groups; lower --optim.groups, or set it to 0."
            )
        return groups

    def fitted(self, batch_size: int, accumulation: int = 1, fixed: Collection[str] = ()) -> Self:
        """The same optimizer with the nearest `batch_fraction` into which the batch divides.

        Args:
          batch_size: rows of the batch.
          accumulation: micro-batches of the batch.
          fixed: names of fields that stay. If `groups` may change it may become 0 (each row apart),
            which counts as much as a fraction twice as large.

        Returns:
          The optimizer itself if its own fraction suits, or if none does.
        """
        if "batch_fraction" in fixed or self.update_interval < 1:
            return self
        own = round(1 / self.batch_fraction)

        def distance(n: int, groups: int) -> float:
            return abs(math.log(n / own)) + (groups != self.groups) * math.log(2)

        groupings = {self.groups} if "groups" in fixed else {self.groups, 0}
        forms = itertools.product(range(1, min(8 * own, batch_size) + 1), groupings)
        for n, groups in sorted(forms, key=lambda form: distance(*form)):
            share = self.batch_fraction if n == own else 1 / n
            form = dataclasses.replace(self, batch_fraction=share, groups=groups)
            with contextlib.suppress(ValueError):
                form.groups_of(batch_size, accumulation)
                return form
        return self

    def idle(self, context: TrainContext, sampling: SamplingPlan) -> str:
        """A better sample if devices wait for rows; empty if none waits."""
        devices = context.row_devices
        rows = context.batch_size // (context.accumulation * sampling.row_stride)
        groups = sampling.groups
        if groups > 1 and rows // groups < devices and sampling.parallel_groups == 1:
            cure = "0 takes them side by side"
            if sampling.cost == "product":  # groups of products never go side by side
                fewer = max(rows // devices, 1) * context.accumulation
                cure = f"{fewer // sampling.microbatch_stride} is faster, and noisier"
            return (
                f"{groups} groups of {rows // groups} sampled rows, one after the other, leave "
                f"devices waiting: --optim.groups {cure}."
            )
        fraction = self.batch_fraction * devices / rows
        if groups < rows or rows >= devices or fraction > 1:
            return ""
        return (
            f"{devices - rows} of {devices} devices wait while {rows} rows are sampled: "
            f"--optim.batch-fraction {fraction:.4g} --optim.groups 0, a row a device, takes no "
            "longer."
        )
