"""Gradients with None where there is a parameter: Equinox filters and adapters make such trees."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def none_left_alone(update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """`update` of the whole tree, whose result is None where the gradient is.

    In it such a leaf has the gradient 0, and so has a `hessian` that is None there.
    """

    @functools.wraps(update)
    def of_whole_tree(updates, state, params=None, **extra):
        if params is None or not _holes(updates, params):
            return update(updates, state, params, **extra)
        full = _filled(updates, params)
        if extra.get("hessian") is not None:
            extra["hessian"] = _filled(extra["hessian"], params)
        step, state = update(full, state, params, **extra)
        hole = jax.tree.map(lambda g: g is None, updates, is_leaf=_is_none)
        return jax.tree.map(lambda none, u: None if none else u, hole, step), state

    return of_whole_tree


def _is_none(x: Any) -> bool:
    return x is None


def _holes(updates: optax.Updates, params: optax.Params) -> bool:
    """Whether the gradient has None where params have a leaf."""
    same = jax.tree.structure(updates) == jax.tree.structure(params)
    return not same and any(map(_is_none, jax.tree.leaves(updates, is_leaf=_is_none)))


def _filled(tree: Any, params: optax.Params) -> Any:
    return jax.tree.map(
        lambda g, p: jax.tree.map(jnp.zeros_like, p) if g is None else g,
        tree,
        params,
        is_leaf=_is_none,
    )
