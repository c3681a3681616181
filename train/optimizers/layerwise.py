"""Stacked layers as optimizers see them: matrices and vectors of one layer each."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import models


def matrices(params: Any) -> Any:
    """The weight-decay mask of every optimizer here: matrices yes, vectors and norms no."""
    return jax.tree.map(lambda axes: axes >= 2, models.logical_ndims(params))


def of_two_axes(params: Any) -> Any:
    """The same mask inside `each_layer`, where nothing is stacked any more."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def dimension_numbers(params: Any) -> Any:
    """What Muon makes orthogonal: the last two axes of matrices, layer by layer."""
    last = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda is_matrix: last if is_matrix else None, matrices(params))


def each_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on each layer of the stacked parameters by itself, and on the others as they are.

    For transformations that look at one parameter at a time and at its shape. Layers go one after
    the other, so that a `lax.cond` in `tx` stays one. Where nothing is stacked this is `tx`.
    """

    def init(params):
        return jax.vmap(tx.init)(params)

    def update(updates, state, params=None):
        return jax.lax.map(lambda x: tx.update(*x), (updates, state, params))

    layers = optax.GradientTransformation(init, update)
    parts = optax.partition({True: layers, False: tx}, _stacked)

    def choose(part: str) -> Callable[..., Any]:
        def function(tree, *rest):
            whole = parts if any(jax.tree.leaves(_stacked(tree))) else tx
            return getattr(whole, part)(tree, *rest)

        return function

    return optax.GradientTransformation(choose("init"), choose("update"))


def probe(kind: str) -> Callable[[jax.Array, Any], Any]:
    """A random vector for `sophia_optax.hutchinson` that is the same for stacked layers and others.

    A parameter's numbers are a function of the key, of its name and of its layer.
    """
    sampler = {"rademacher": jax.random.rademacher, "normal": jax.random.normal}[kind]

    def draw(key: jax.Array, params: Any) -> Any:
        def leaf(path, x, stacked):
            names = [str(entry.key) for entry in path]
            layer = names.pop(1) if names[0] == "blocks" and not stacked else None
            here = jax.random.fold_in(key, zlib.crc32("/".join(names).encode()))
            if names[0] != "blocks":
                return sampler(here, x.shape, x.dtype)
            if layer is not None:
                return sampler(jax.random.fold_in(here, int(layer)), x.shape, x.dtype)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(here, jnp.arange(len(x)))
            return jax.vmap(lambda key: sampler(key, x.shape[1:], x.dtype))(keys)

        return jax.tree.map_with_path(leaf, params, _stacked(params))

    return draw


def _stacked(params: Any) -> Any:
    """Whether each leaf has an axis of layers."""
    return jax.tree.map(lambda x, axes: x.ndim > axes, params, models.logical_ndims(params))
