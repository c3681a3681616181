"""What the trainer knows of an optimizer: its transformation, and how a step samples curvature."""

import abc
import dataclasses
from collections.abc import Collection
from typing import Literal, NamedTuple, Self

import optax

from sophia_optax import Estimator


class TrainContext(NamedTuple):
    """What an optimizer may need to know of the run."""

    schedule: optax.Schedule  # learning rate of a step
    seed: int = 0
    steps: int = 1  # of the whole run
    batch_size: int = 0  # rows of a step, over all devices
    accumulation: int = 1  # micro-batches of a step
    row_devices: int = 1  # devices over which rows are spread
    max_grad_norm: float | None = None  # global norm to clip gradients to; None does not clip


class SamplingPlan(NamedTuple):
    """How a step samples the curvature of the model."""

    estimator: Estimator  # evaluated on one micro-batch
    row_stride: int  # n: every n-th row of a micro-batch is sampled
    microbatch_stride: int  # n: every n-th micro-batch is sampled
    groups: int  # sets of a micro-batch's rows that are sampled apart
    parallel_groups: int  # groups side by side; 1 gives all devices to each
    draws: int  # labels or probes averaged in one sample
    cost: Literal["backward", "product"]  # a draw: a backward pass, or a Hessian-vector product

    @property
    def rounds(self) -> int:
        """Times that `parallel_groups` groups are sampled, one after the other."""
        return -(-self.groups // self.parallel_groups)


class Due(NamedTuple):
    """What a step renews; static, so each combination is a program of its own.

    True and False are decided on the host. None leaves the decision to the transformation.
    """

    refresh: bool | None = None  # curvature
    renew: bool | None = None  # roots, eigenvectors, projections

    @property
    def name(self) -> str:
        """Name of the step in progress messages.

        >>> Due(True, None).name, Due(False, False).name, Due().name
        ('step that samples curvature', 'plain step', 'step')
        """
        renewed = [
            word for word, x in zip(("samples curvature", "renews roots"), self, strict=True) if x
        ]
        if renewed:
            return f"step that {' and '.join(renewed)}"
        return "plain step" if False in self else "step"


class BuiltOptimizer(NamedTuple):
    """An optimizer as the trainer uses it."""

    tx: optax.GradientTransformation  # with gradient clipping
    sampling: SamplingPlan | None = None  # None: the model is not sampled
    refresh_interval: int = 1  # steps between refreshes of curvature
    renew_interval: int = 1  # steps between renewals of roots, eigenvectors, projections

    def due(self, step: int, pending: Due = Due(False, False)) -> Due:  # noqa: B008
        """What a step renews. An interval of 1 gives None: one program serves all steps.

        Args:
          step: steps done.
          pending: what skipped steps were to renew: this one does.

        >>> built = BuiltOptimizer(optax.identity(), refresh_interval=10)
        >>> built.due(10), built.due(11)
        (Due(refresh=True, renew=None), Due(refresh=False, renew=None))
        """
        intervals = zip((self.refresh_interval, self.renew_interval), pending, strict=True)
        return Due(*(None if n == 1 else bool(owed) or step % n == 0 for n, owed in intervals))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(abc.ABC):
    """Hyperparameters of one optimizer; its fields are its flags on the command line."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    @abc.abstractmethod
    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The optimizer for a run.

        Raises:
          ValueError: hyperparameters do not fit each other or the run.
        """

    def fitted(self, batch_size: int, accumulation: int, fixed: Collection[str] = ()) -> Self:
        """The nearest hyperparameters that suit a batch; most optimizers suit any batch.

        Args:
          batch_size: rows of the batch.
          accumulation: micro-batches of the batch.
          fixed: names of fields that stay as they are.
        """
        del batch_size, accumulation, fixed
        return self

    def idle(self, context: TrainContext, sampling: SamplingPlan) -> str:
        """Advice if devices wait while curvature is sampled; empty if none does."""
        del context, sampling
        return ""


def clipped(tx: optax.GradientTransformation, context: TrainContext) -> BuiltOptimizer:
    """An optimizer that samples nothing, on gradients clipped to `context.max_grad_norm`."""
    return BuiltOptimizer(clip_first(tx, context))


def clip_first(
    tx: optax.GradientTransformation, context: TrainContext
) -> optax.GradientTransformation:
    """`tx` on gradients clipped to `context.max_grad_norm`."""
    if context.max_grad_norm is None:
        return tx
    return optax.chain(optax.clip_by_global_norm(context.max_grad_norm), tx)
