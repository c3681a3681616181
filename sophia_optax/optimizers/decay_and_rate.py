"""The end of every optimizer: decoupled weight decay, then the learning rate; and shared checks."""

from collections.abc import Callable
from typing import Any

import optax

from sophia_optax import checks

Mask = Any | Callable[[optax.Params], Any] | None


def decay_and_rate(
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
    learning_rate: optax.ScalarOrSchedule,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The last two links of every chain here; a decay of 0 needs no params.

    Raises:
      ValueError: a number is not finite.
      TypeError: a number is None or a string.
    """
    numbers = {"weight_decay": weight_decay, "learning_rate": learning_rate}
    for name, x in numbers.items():
        if not callable(x):  # optax reads a learning rate of None as +1, a step uphill
            checks.real_number(name, x)
            checks.finite(**{name: x})
    decay = optax.add_decayed_weights(weight_decay, mask)
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        decay = optax.GradientTransformation(
            decay.init, lambda updates, state, params=None: (updates, state)
        )
    return decay, optax.scale_by_learning_rate(learning_rate)


def check_averages(b1: Any, b2: Any, mu_dtype: Any, hessian_dtype: Any) -> None:
    """Rejects decays and dtypes under which an average of gradients or curvature cannot move."""
    checks.decays(b1=b1, b2=b2)
    checks.momentum_dtype("mu_dtype", mu_dtype)
    checks.curvature_dtype("hessian_dtype", hessian_dtype)
