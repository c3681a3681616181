"""Paths of parameters on the same gradients: ours in one scan, an oracle's step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles as o

STEPS = 32
SHAPES = {"scalar": (), "matrix": (3, 4), "tensor": (2, 3, 2)}
TOLERANCE = {
    "float32": {"rtol": 1e-5, "atol": 1e-6},
    "float64": {"rtol": 1e-12, "atol": 1e-13},
}
MASK = {"weight_decay": 0.3, "weight_decay_mask": {n: n == "matrix" for n in SHAPES}}


def schedule(count):
    return 0.1 * 0.9**count


def trees(seed, scale=1.0, shift=0.0, steps=STEPS):
    """`{name: [steps, *shape]}`, normal numbers."""
    rng = np.random.default_rng(seed)
    return {n: shift + scale * rng.normal(size=(steps, *s)) for n, s in SHAPES.items()}


def row(values, t):
    """Step t of an array, of a tree of arrays, or of None."""
    return jax.tree.map(lambda leaf: leaf[t], values)


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


PARAMS = row(trees(0, steps=1), 0)
GRADS = trees(1)
SAMPLES = trees(2, scale=2.0, shift=1.0)  # a third of them negative
REJECTED = {n: s.copy() for n, s in SAMPLES.items()}
for t, bad in ((0, np.nan), (9, np.inf), (15, np.nan)):  # at k = 3 the first, and two later ones
    REJECTED["matrix"][t, 1, 2] = bad


def given_sample(key, params, updates, *, sample, **unused):
    """An estimator that returns the extra argument `sample`, so the test knows each sample."""
    return sample


def ours(tx, dtype, grads=GRADS, watch=lambda state: {}, **given):
    """(the path of the parameters and of what is watched, [STEPS, ...]; the last state).

    `given` are the extra arguments of `update`, [STEPS, ...] each or None.
    """
    params = cast(PARAMS, dtype)

    def step(carry, xs):
        params, state = carry
        grads, given = xs
        updates, state = tx.update(grads, state, params, **given)
        params = optax.apply_updates(params, updates)
        return (params, state), params | watch(state)

    def numbers(x):
        return jnp.asarray(x, x.dtype if x.dtype == bool else dtype)

    xs = jax.tree.map(numbers, (grads, given))
    (_, state), path = jax.lax.scan(step, (params, tx.init(params)), xs)
    return path, state


def theirs(oracle, grads=GRADS, watch=lambda oracle: {}, **given):
    """The same path by an oracle, whose extra arguments are named `hessian` and `value`."""
    weight_decay, params, path = oracle.weight_decay, PARAMS, []
    for t in range(STEPS):
        oracle.weight_decay = o.rate(weight_decay, t)  # a schedule of it is no oracle's
        params = oracle.step(params, row(grads, t), **row(given, t))
        path.append(params | watch(oracle))
    return {name: np.stack([p[name] for p in path]) for name in path[0]}


def oracle_arguments(arguments):
    """Our arguments, with the mask as a set of names, as oracles take it."""
    arguments = dict(arguments)
    masked = arguments.pop("weight_decay_mask", None) is not None
    return arguments | {"decay_names": {"matrix"} if masked else None}


def assert_equal_paths(path, expected, dtype, **tolerance):
    for name, leaf in expected.items():
        assert path[name].dtype == dtype
        np.testing.assert_allclose(path[name], leaf, **(TOLERANCE[dtype] | tolerance), err_msg=name)
