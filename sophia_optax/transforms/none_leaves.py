"""Gradients that are None where params have a leaf, as Equinox filters and adapters make them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Update = Callable[..., tuple[Any, Any]]


def skip_none_leaves(update: Update) -> Update:
    """Makes the result of `update` None wherever the gradient is.

    `update` itself sees the whole tree: a gradient of 0 in place of each None, and a curvature
    sample of 0 in place of each None in `hessian`.
    """

    @functools.wraps(update)
    def update_whole_tree(updates, state, params=None, **extra):
        if params is None or not _has_none(updates, params):
            return update(updates, state, params, **extra)
        full = _with_zeros(updates, params)
        if extra.get("hessian") is not None:
            extra["hessian"] = _with_zeros(extra["hessian"], params)
        step, state = update(full, state, params, **extra)
        absent = jax.tree.map(_is_none, updates, is_leaf=_is_none)
        return jax.tree.map(lambda none, u: None if none else u, absent, step), state

    return update_whole_tree


def _is_none(x: Any) -> bool:
    return x is None


def _has_none(updates: optax.Updates, params: optax.Params) -> bool:
    """Whether the gradient has None where params have a leaf."""
    same = jax.tree.structure(updates) == jax.tree.structure(params)
    return not same and any(map(_is_none, jax.tree.leaves(updates, is_leaf=_is_none)))


def _with_zeros(tree: Any, params: optax.Params) -> Any:
    """`tree` with zeros shaped as the parameter in place of each None."""
    return jax.tree.map(
        lambda g, p: jax.tree.map(jnp.zeros_like, p) if g is None else g,
        tree,
        params,
        is_leaf=_is_none,
    )
