"""SOAA: Adam or a Newton step in a trust region."""

import dataclasses
from typing import Literal

import sophia_optax
from train.optimizers.arguments import StateDtype, arguments_of
from train.optimizers.base import BuiltOptimizer, OptimizerConfig, TrainContext, clipped


@dataclasses.dataclass(frozen=True)
class Soaa(OptimizerConfig):
    """Adam or a Newton step, the shorter, in a trust region that follows the loss.

        step = -lr (r m / (max(r F, sqrt(v)) + eps) + weight_decay p)

    m averages gradients, v their squares, F is v times a factor of the whole tree, and the radius
    r grows while steps lower the loss as predicted. At the gradients of language models sqrt(v) is
    the larger: this is Adam times r. The state takes 8 bytes a parameter, as AdamW's.
    """

    learning_rate: float = 6e-4
    """Peak learning rate; AdamW's is a start, r multiplies it by .75 to 2."""
    b1: float = 0.9
    """Decay of m, which averages 1 / (1 - b1) steps; short runs with small batches want .8."""
    b2: float = 0.999
    """Decay of v."""
    gamma: float = 0.25
    """The bounds of r go from [1, 2] to [1 - gamma, 1 + gamma] over the run."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""
    rule: Literal["soaa", "tadam"] = "soaa"
    """Rule of the radius: as printed, or its parent's, for one more number a parameter."""
    mu_dtype: StateDtype = "float32"
    """Dtype of m; bfloat16 rounds to nearest: changes under a 256th of m are lost."""
    hessian_dtype: StateDtype = "float32"
    """Dtype of v; bfloat16 is rounded stochastically, and keeps the mean."""

    def build(self, context: TrainContext) -> BuiltOptimizer:
        """The transformation; the bounds of its radius close in over the whole run."""
        arguments = arguments_of(self, context)
        return clipped(sophia_optax.soaa(**arguments, total_steps=context.steps), context)
