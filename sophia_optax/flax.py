"""Flax models and train states for optimizers that take extra arguments; needs `flax`."""

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
    """Makes a function of an NNX module one of its parameters, as `obj_fn` and `logits_fn` are.

    Each call gets a copy of the module with these parameters in place. Counters of dropout and
    running averages move in the copy; `model` itself keeps its own.

    Args:
      function: `(model, *arguments) -> result`. What it sets on the model, as `model.eval()` does,
        ends with the call.
      model: of `nnx.Optimizer`. Make the function where it is used, inside `nnx.jit`: all that is
        not `wrt` is read now.
      wrt: filter of the parameters, that of `nnx.Optimizer`.
      has_state: the result is `(function(model, *arguments), state)`, state being all variables of
        the copy that are not `wrt`, after the call: for `value_grad_and_hessian` with
        `has_state=True`, or as the auxiliary output of Hutchinson's `obj_fn`. `nnx.update(model,
        state)` puts it into the model.

    Returns:
      A function `(params, *arguments)`, pure. Its params are what `nnx.Optimizer` hands on, or
      `nnx.state(model, wrt)`. Masks of dropout are those that the model draws next, the same for
      each group of an estimator; for others call `nnx.reseed` in `function` with a key of `inputs`.

    Raises:
      ValueError: on the call, if params are not those that `wrt` selects of the model.

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
                f"{structure.num_leaves} that wrt={wrt} selects of the model. Pass of_params the "
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

    Of the keywords of `apply_gradients` those that name fields, such as `batch_stats` of a
    subclass, are put in their place as in Flax. All others go to `tx.update`; optimizers ignore
    what they do not know, so a field that is misspelt is not noticed.

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
          grads: as params.
          **kwargs: fields to replace, and extra arguments of `tx.update`.

        Returns:
          The next state.
        """
        fields = {name: x for name, x in kwargs.items() if name in self.__dataclass_fields__}
        extra = {name: x for name, x in kwargs.items() if name not in fields}
        tx = optax.with_extra_args_support(self.tx)
        bound = optax.GradientTransformation(tx.init, partial(tx.update, **extra))
        step = super(TrainState, self.replace(tx=bound)).apply_gradients
        return cast(Self, step(grads=grads, **fields)).replace(tx=self.tx)
