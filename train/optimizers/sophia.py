"""Sophia-G and Sophia-H: the same optimizer with two estimators of curvature."""

import dataclasses
from typing import Literal

import sophia_optax
from train.optimizers.arguments import StateDtype, arguments_of
from train.optimizers.base import BuiltOptimizer, SamplingPlan, TrainContext, clip_first
from train.optimizers.layerwise import probe
from train.optimizers.sampling import SamplesRows
from train.parallel.mesh import ROWS


@dataclasses.dataclass(frozen=True)
class Sophia(SamplesRows):
    """What Sophia-G and Sophia-H share: all but the estimator."""

    learning_rate: float = 6e-4
    """Peak learning rate: the step of a clipped coordinate."""
    b1: float = 0.965
    """Decay of m, which averages 1 / (1 - b1) steps; short runs with small batches want .8."""
    b2: float = 0.99
    """Decay of h at each sample, so h averages update_interval / (1 - b2) steps."""
    gamma: float = 0.05
    """Factor on h; raise it if win_rate stays under .1, lower it if over .5."""
    eps: float = 1e-12
    """Floor of the denominator; a coordinate at the floor takes a sign step."""
    clip_threshold: float = 1.0
    """Bound on each coordinate of the step, in learning rates."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""
    debias_momentum: bool = True
    """Correct m for its start at 0; the paper does not."""
    debias_hessian: bool = True
    """Correct h for its start at 0; the paper does not, and clips nearly all steps at first."""
    mu_dtype: StateDtype = "float32"
    """Dtype of m; bfloat16 rounds to nearest: changes under a 256th of m are lost."""
    hessian_dtype: StateDtype = "float32"
    """Dtype of h; bfloat16 is rounded stochastically, which keeps the mean."""
    statistics: bool = True
    """Measure win_rate, clipped_fraction and floored_fraction at each sample, on a 64th of the
    coordinates."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation, and how a step samples curvature for it."""
        sampling, arguments = self.plan(context), arguments_of(self, context)
        for name in ("amortize", "batch_fraction", "groups", "num_samples", "probe"):
            arguments.pop(name, None)  # they are in the estimator
        arguments["update_interval"] //= self.slices
        arguments["b2"] **= 1 / self.slices
        tx = sophia_optax.sophia_h(**arguments, estimator=sampling.estimator, seed=context.seed)
        return BuiltOptimizer(clip_first(tx, context), sampling, arguments["update_interval"])


@dataclasses.dataclass(frozen=True)
class SophiaG(Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimate of curvature.

        step = -lr (clip(m / max(gamma h, eps)) + weight_decay p)

    m averages gradients. h averages samples of the Gauss-Newton diagonal: squared gradients on
    labels drawn from the model's own predictions. A sample costs about a gradient. Tune the
    learning rate first, then gamma by `win_rate`, the fraction of coordinates that are not clipped,
    which is among the metrics. The state takes 8 bytes a parameter, as AdamW's.
    """

    num_samples: int = 1
    """Draws of all labels averaged in one sample; each costs a gradient."""

    def plan(self, context: TrainContext) -> SamplingPlan:
        """How a step samples the Gauss-Newton diagonal."""
        every, stride = self.strides(context.batch_size, context.accumulation)
        groups = self.groups_of(context.batch_size, context.accumulation)
        rows = context.batch_size // (context.accumulation * stride * groups)
        parallel = parallel_groups(groups, rows, context.row_devices)
        estimator = sophia_optax.gauss_newton_bartlett(
            groups=groups,
            batch_fraction=1 / stride,
            num_samples=self.num_samples,
            parallel_groups=parallel,
            spmd_axis_name=ROWS if parallel > 1 else None,
        )
        return SamplingPlan(
            estimator, stride, every, groups, parallel, self.num_samples, "backward"
        )


@dataclasses.dataclass(frozen=True)
class SophiaH(Sophia):
    """Sophia with Hutchinson's estimate of curvature.

        step = -lr (clip(m / max(gamma h, eps)) + weight_decay p)

    m averages gradients. h averages samples of the Hessian diagonal: Hessian-vector products with
    random signs. A sample costs about 2.5 gradients. Tune the learning rate first, then gamma by
    `win_rate`, the fraction of coordinates that are not clipped, which is among the metrics. The
    state takes 8 bytes a parameter, as AdamW's.
    """

    gamma: float = 0.01
    """Factor on h; raise it if win_rate stays under .1, lower it if over .5."""
    probe: Literal["rademacher", "normal"] = "rademacher"
    """Random vector of the product; normal is the paper's, of larger variance."""
    num_samples: int = 1
    """Products averaged in one sample."""

    def plan(self, context: TrainContext) -> SamplingPlan:
        """How a step samples the Hessian diagonal; all devices share each product."""
        every, stride = self.strides(context.batch_size, context.accumulation)
        groups = self.groups_of(context.batch_size, context.accumulation)
        estimator = sophia_optax.hutchinson(
            probe=probe(self.probe),
            num_samples=self.num_samples,
            groups=groups,
            batch_fraction=1 / stride,
        )
        return SamplingPlan(estimator, stride, every, groups, 1, self.num_samples, "product")


def parallel_groups(groups: int, rows: int, devices: int) -> int:
    """Groups that are sampled side by side; 1 samples them in turn, all devices to each.

    All groups that the devices divide go side by side, for one reduction of their squares. Above
    8 groups a device, whose gradients of a layer would all be alive at once, each device takes one
    group a round. Groups of one row go so too, the last round with idle devices; larger groups
    would hold more memory than they save time.

    Args:
      groups: of a sampled micro-batch.
      rows: of a group.
      devices: over which rows are spread.

    >>> parallel_groups(8, 2, 4), parallel_groups(6, 1, 4), parallel_groups(6, 2, 4)
    (8, 4, 1)
    """
    if 1 in (devices, groups) or (groups % devices and rows > 1):
        return 1
    return devices if groups % devices or groups > 8 * devices else groups
