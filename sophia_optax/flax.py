"""Flax modules and train states with optimizers that take extra arguments; needs `flax`."""

from collections.abc import Callable
from functools import partial
from typing import Any, Self, cast

import jax
import optax

try:
    from flax import nnx
    from flax.training import train_state
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sophia_optax.flax needs Flax, and {error.name!r} is not installed: pip install flax.",
        name=error.name,
    ) from error

__all__ = ["TrainState", "of_params"]


def of_params(
    function: Callable[..., Any],
    model: nnx.Module,
    *,
    wrt: Any = nnx.Param,
    has_state: bool = False,
) -> Callable[..., Any]:
    """Turns a function of an NNX module into a function of its parameters, such as `obj_fn`.

    Each call runs on a copy of the module that holds the given parameters. Dropout counters and
    running averages change in the copy; `model` keeps its own.

    Args:
      function: `(model, *arguments) -> result`. Settings that it changes on the model, as with
        `model.eval()`, end with the call.
      model: the module of `nnx.Optimizer`. Call `of_params` where the function is used, inside
        `nnx.jit`, since it reads all variables that are not `wrt` at once.
      wrt: filter of the parameters, the same as in `nnx.Optimizer`.
      has_state: return `(function(model, *arguments), state)`, where state holds all variables of
        the copy that are not `wrt`, after the call. Use it for `value_grad_and_hessian` with
        `has_state=True`, or for the auxiliary output of Hutchinson's `obj_fn`; `nnx.update(model,
        state)` writes it into the model.

    Returns:
      A pure function `(params, *arguments)`. `params` is what `nnx.Optimizer` passes on, or
      `nnx.state(model, wrt)`. Dropout masks are those that the model draws next, the same in each
      row group of an estimator. For different masks call `nnx.reseed` in `function` with a key from
      `inputs`.

    Raises:
      ValueError: when called, if `params` are not the variables that `wrt` selects.

    >>> import jax.numpy as jnp
    >>> from sophia_optax import sophia_h
    >>> def loss(model, x):
    ...     return jnp.mean(jnp.cosh(model(x)))
    >>> @nnx.jit
    ... def step(model, optimizer, x):
    ...     grads = nnx.grad(loss)(model, x)
    ...     optimizer.update(model, grads, obj_fn=of_params(loss, model), inputs=x)
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, sophia_h(1e-3), wrt=nnx.Param)
    >>> step(model, optimizer, jnp.ones((4, 3)))
    >>> int(optax.tree.get(optimizer.opt_state, "accepted")[...])
    1
    """
    graph, own, rest = nnx.split(model, wrt, ...)
    structure = _structure(own)

    def function_of_params(params, *arguments):
        if _structure(params) != structure:
            raise ValueError(
                f"params have {len(jax.tree.leaves(params))} leaves, which are not the "
                f"{structure.num_leaves} that wrt={wrt} selects in the model. Pass of_params the "
                "`wrt` of nnx.Optimizer."
            )
        copied = nnx.merge(graph, params, rest, copy=True)
        result = function(copied, *arguments)
        if not has_state:
            return result
        _, _, state = nnx.split(copied, wrt, ...)
        return result, state

    return function_of_params


def _structure(params: Any) -> Any:
    return jax.tree.structure(nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params)


class TrainState(train_state.TrainState):
    """Flax's TrainState whose `apply_gradients` passes extra arguments to the optimizer.

    Keywords of `apply_gradients` that name fields, such as `batch_stats` of a subclass, replace
    these fields as in Flax. All others are passed to `tx.update`. Optimizers ignore arguments that
    they do not know, so a misspelt field goes unnoticed.

    >>> import jax, jax.numpy as jnp
    >>> from sophia_optax import sophia_h
    >>> def loss(params):
    ...     return jnp.mean(jnp.cosh(params["w"]))
    >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=sophia_h(1e-3))
    >>> state = state.apply_gradients(grads=jax.grad(loss)(state.params), obj_fn=loss)
    >>> print(state.step, optax.tree.get(state.opt_state, "accepted"))
    1 1
    """

    def apply_gradients(self, *, grads: optax.Updates, **kwargs: Any) -> Self:
        """One step of the optimizer.

        Args:
          grads: gradients, shaped as params.
          **kwargs: new values of fields, and extra arguments of `tx.update`.

        Returns:
          The state after the step.
        """
        fields = {name: x for name, x in kwargs.items() if name in self.__dataclass_fields__}
        extra = {name: x for name, x in kwargs.items() if name not in fields}
        tx = optax.with_extra_args_support(self.tx)
        bound = optax.GradientTransformation(tx.init, partial(tx.update, **extra))
        step = super(TrainState, self.replace(tx=bound)).apply_gradients
        return cast(Self, step(grads=grads, **fields)).replace(tx=self.tx)
