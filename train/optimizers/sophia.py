"""Sophia-G and Sophia-H on the command line: what they sample, and of which rows."""

import contextlib
import dataclasses
import itertools
import math
from typing import Any, Literal, Self

import optax

import sophia_optax
from sophia_optax.estimators.rows import check_fraction
from train.optimizers.layerwise import matrices, probe
from train.parallel.mesh import ROWS

StateDtype = Literal["float32", "bfloat16"]


def arguments_of(fields: dict[str, Any], learning_rate: optax.Schedule) -> dict[str, Any]:
    """Of an alias: fields have the names of the arguments that they become."""
    return fields | {"learning_rate": learning_rate, "weight_decay_mask": matrices}


@dataclasses.dataclass(frozen=True)
class _Sophia:
    """What Sophia-G and Sophia-H share: all but the estimator."""

    learning_rate: float = 6e-4
    """Peak learning rate: the step of a clipped coordinate."""
    b1: float = 0.965
    """Decay of m, which averages 1 / (1 - b1) steps; short runs with small batches want .8."""
    b2: float = 0.99
    """Decay of h at each sample, so it averages update_interval / (1 - b2) steps."""
    gamma: float = 0.05
    """Factor on h; raise it if win_rate stays under .1, lower it if over .5."""
    eps: float = 1e-12
    """Floor of the denominator; a coordinate at it takes a sign step."""
    clip_threshold: float = 1.0
    """Bound on each coordinate of the step, in learning rates."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""
    update_interval: int = 10
    """Steps between samples of curvature."""
    spread: bool = False
    """Sample a part of the share at every step, instead of all of it every update_interval steps:
    all steps cost the same, and h remembers as many steps, but more samples. Better where steps
    must keep time, or a whole sample needs too much memory; worse where the update is a large part
    of a step, which then moves 44 bytes a parameter instead of 28."""
    batch_fraction: float = 1.0
    """Share of the batch that a sample is taken of: less is cheaper and noisier."""
    groups: int = 1
    """Sets of a sample's rows that are sampled apart, for less variance at equal cost, at least
    one a micro-batch; must divide the rows. 0 takes each row apart, for the least."""
    debias_momentum: bool = True
    """Correct m for its start at 0; the paper does not."""
    debias_hessian: bool = True
    """Correct h for its start at 0; the paper does not, and clips nearly all at first."""
    mu_dtype: StateDtype = "float32"
    """Dtype of m; bfloat16 rounds to nearest: changes under a 256th of m are lost."""
    hessian_dtype: StateDtype = "float32"
    """Dtype of h; bfloat16 is rounded stochastically, and keeps the mean."""
    statistics: bool = True
    """Measure win_rate, clipped_fraction and floored_fraction at each sample, on a 64th of the
    coordinates."""

    @property
    def slices(self) -> int:
        """Steps over which a sample is spread."""
        return self.update_interval if self.spread else 1

    def strides(self, batch_size: int, accumulation: int = 1) -> tuple[int, int]:
        """What a step samples: every a-th of its micro-batches, and of these every b-th row.

        Together that is every (a b)-th row of the batch, whatever the accumulation.

        Returns:
          (a, b)

        Raises:
          ValueError: `batch_fraction` is no n-th, or rows and micro-batches cannot be cut so.
        """
        check_fraction(self.batch_fraction)
        if self.update_interval < 1:
            raise ValueError(
                f"--optim.update-interval {self.update_interval} must be at least 1, which samples "
                "at every step."
            )
        stride = round(1 / self.batch_fraction) * self.slices
        if batch_size % stride:
            over = f" spread over {self.slices} steps" * self.spread
            raise ValueError(
                f"batch_fraction={self.batch_fraction}{over} takes every {stride}-th row, which "
                f"does not divide batch_size={batch_size}. Choose a multiple of {stride} rows, or "
                f"another --optim.batch-fraction{' or --optim.update-interval' * self.spread}."
            )
        if stride % accumulation and accumulation % stride:
            raise ValueError(
                f"accumulation={accumulation} cuts the batch into every {accumulation}-th row, "
                f"curvature is sampled of every {stride}-th: one must divide the other. Choose "
                f"--accumulation {stride} or a factor of it, or --optim.batch-fraction "
                f"{1 / accumulation:g}."
            )
        return min(stride, accumulation), max(stride // accumulation, 1)

    def groups_of(self, batch_size: int, accumulation: int) -> int:
        """Groups of each micro-batch that is sampled."""
        every, stride = self.strides(batch_size, accumulation)
        rows = batch_size // (accumulation * stride)
        groups = math.ceil(self.groups * every / accumulation) or rows
        if not groups or rows % groups:
            raise ValueError(
                f"{rows} rows, sampled of each of {accumulation // every} micro-batches, do not "
                f"divide into {groups} groups; lower --optim.groups, or set it to 0."
            )
        return groups

    def fitted(self, batch_size: int, accumulation: int = 1, *, regroup: bool = True) -> Self:
        """The same optimizer with the nearest share into which the rows can be cut.

        Args:
          batch_size: rows of the batch.
          accumulation: micro-batches of the batch.
          regroup: whether each row may be taken apart, where no share near suits `groups`; that
            counts as much as a share twice as large.

        Returns:
          The optimizer itself if its own share suits, or none does.
        """
        own = round(1 / self.batch_fraction)

        def distance(n: int, groups: int) -> float:
            return abs(math.log(n / own)) + (groups != self.groups) * math.log(2)

        forms = itertools.product(
            range(1, min(8 * own, batch_size) + 1), {self.groups, 0} if regroup else {self.groups}
        )
        for n, groups in sorted(forms, key=lambda form: distance(*form)):
            share = self.batch_fraction if n == own else 1 / n
            form = dataclasses.replace(self, batch_fraction=share, groups=groups)
            with contextlib.suppress(ValueError):
                form.groups_of(batch_size, accumulation)
                return form
        return self

    def _make(self, learning_rate: optax.Schedule, seed: int, estimator: sophia_optax.Estimator):
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(_Sophia)}
        del shared["spread"], shared["batch_fraction"], shared["groups"]
        shared["update_interval"] //= self.slices
        shared["b2"] **= 1 / self.slices
        arguments = arguments_of(shared, learning_rate)
        return sophia_optax.sophia_h(**arguments, seed=seed, estimator=estimator)


@dataclasses.dataclass(frozen=True)
class SophiaG(_Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimate of curvature.

        step = -lr (clip(m / max(gamma h, eps)) + weight_decay p)

    m averages gradients, h samples of the Gauss-Newton diagonal: squared gradients on labels drawn
    from the model's own predictions. A sample costs about a gradient. Tune the learning rate
    first, then gamma by `win_rate`, the share of coordinates that are not clipped, which the
    metrics hold. The state takes 8 bytes a parameter, as AdamW's.
    """

    num_samples: int = 1
    """Draws of all labels averaged in one sample; each costs a gradient."""

    def estimator(
        self, shards: int, batch_size: int = 0, accumulation: int = 1
    ) -> sophia_optax.Estimator:
        """What samples curvature of one micro-batch, which is the batch unless that is cut.

        Args:
          shards: groups side by side, over the mesh axes of rows; 1 for one after the other.
          batch_size: rows of the batch; 0 for any number, if `groups` is not 0.
          accumulation: micro-batches of the batch.
        """
        return sophia_optax.gauss_newton_bartlett(
            groups=self.groups_of(batch_size, accumulation),
            batch_fraction=1 / self.strides(batch_size, accumulation)[1],
            num_samples=self.num_samples,
            parallel_groups=shards,
            spmd_axis_name=ROWS if shards > 1 else None,
        )

    def shards(self, devices: int, batch_size: int, accumulation: int = 1) -> int:
        """Groups side by side; 1 if they go one after the other, all devices to each.

        All that devices divide, for one reduction of their squares; above 8 a device, whose
        gradients of a layer all live at once, a group a device in rounds. A group a row goes so
        too, the last round with idle devices; larger groups would hold more than they save.
        """
        groups = self.groups_of(batch_size, accumulation)
        rows = batch_size // (accumulation * self.strides(batch_size, accumulation)[1] * groups)
        if 1 in (devices, groups) or (groups % devices and rows > 1):
            return 1
        return devices if groups % devices or groups > 8 * devices else groups

    def make(
        self,
        learning_rate: optax.Schedule,
        *,
        seed: int,
        batch_size: int = 0,
        accumulation: int = 1,
        **unused,
    ):
        """The transformation."""
        return self._make(learning_rate, seed, self.estimator(1, batch_size, accumulation))


@dataclasses.dataclass(frozen=True)
class SophiaH(_Sophia):
    """Sophia with Hutchinson's estimate of curvature.

        step = -lr (clip(m / max(gamma h, eps)) + weight_decay p)

    m averages gradients, h samples of the Hessian diagonal: Hessian-vector products with random
    signs. A sample costs about 2.5 gradients. Tune the learning rate first, then gamma by
    `win_rate`, the share of coordinates that are not clipped, which the metrics hold. The state
    takes 8 bytes a parameter, as AdamW's.
    """

    gamma: float = 0.01
    """Factor on h; raise it if win_rate stays under .1, lower it if over .5."""
    probe: Literal["rademacher", "normal"] = "rademacher"
    """Random vector of the product; normal is the paper's, of larger variance."""
    num_samples: int = 1
    """Products averaged in one sample."""

    def estimator(
        self, shards: int, batch_size: int = 0, accumulation: int = 1
    ) -> sophia_optax.Estimator:
        """What samples curvature of one micro-batch, as for Sophia-G; `shards` change nothing."""
        del shards
        return sophia_optax.hutchinson(
            probe=probe(self.probe),
            num_samples=self.num_samples,
            groups=self.groups_of(batch_size, accumulation),
            batch_fraction=1 / self.strides(batch_size, accumulation)[1],
        )

    def shards(self, devices: int, batch_size: int, accumulation: int = 1) -> int:
        """1: all devices share a product."""
        del devices, batch_size, accumulation
        return 1

    def make(
        self,
        learning_rate: optax.Schedule,
        *,
        seed: int,
        batch_size: int = 0,
        accumulation: int = 1,
        **unused,
    ):
        """The transformation."""
        return self._make(learning_rate, seed, self.estimator(1, batch_size, accumulation))
