"""`scale_by_blocks` against float64 references: laws of whitening, state, and arguments."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles as o
import pytest
from contract import assert_close, types

from models import split
from models.presets import PRESETS
from sophia_optax import orthosoph, scale_by_blocks

rng = np.random.default_rng(0)

# ---------------------------------------------------------------- references over 32 steps

STEPS = 32
SHAPES = {
    "scalar": (),
    "vector": (5,),
    "ragged": (5, 7),
    "tall": (9, 4),
    "stack": (2, 3, 6),
    "column": (4, 1),
}
# Scales from leaf to leaf and a slow drift: a root of the wrong age or scale shows.
GRADS = {
    n: 10.0 ** -(i % 3) * (rng.normal(size=(STEPS, *s)) + rng.normal(size=s))
    for i, (n, s) in enumerate(SHAPES.items())
}
PARAMS = {n: rng.normal(size=s) for n, s in SHAPES.items()}


def schedule(count):
    return 0.1 * 0.9**count


def ours(refresh=None, **arguments):
    """The path of the parameters in float64, `{name: [STEPS, *shape]}`."""
    tx = orthosoph(**arguments)

    def step(carry, xs):
        params, state = carry
        updates, state = tx.update(xs[0], state, params, refresh=xs[1])
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jax.jit
    def run(params, xs):
        return jax.lax.scan(step, (params, tx.init(params)), xs)[1]

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(PARAMS, (GRADS, refresh)))


def theirs(oracle):
    params, path = PARAMS, []
    for t in range(STEPS):
        params = oracle.step(params, {n: g[t] for n, g in GRADS.items()})
        path.append(params)
    return {name: np.stack([p[name] for p in path]) for name in SHAPES}


LETTER = {"form": "tiles", "rms": None, "mu_dtype": None, "nesterov": False}
PLAIN = {"mu_dtype": None, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("block_size", "case"),
    [
        (1, {"b1": 0.9, "b2": 0.9, "eps": 1e-3, "nesterov": True}),
        (3, {"b1": 0.9, "b2": 0.99, "eps": 1e-4}),
        (4, {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "learning_rate": schedule, "weight_decay": 0.1}),
        (16, {"b1": 0.0, "b2": 0.0, "eps": 1e-2, "weight_decay": 0.3}),
    ],
)
def test_every_step_of_tiles_is_the_faithful_reading(block_size, case):
    case = {"learning_rate": 0.1, "weight_decay": 0.0, "nesterov": False} | case
    expected = theirs(o.OrthoSophTiles(b=block_size, **case))
    path = ours(block_size=block_size, **LETTER | case)
    assert_close(path, expected, rtol=1e-10, atol=1e-12)


def test_masked_leaves_and_decays_of_tiles_are_the_faithful_reading():
    case = {"learning_rate": 0.1, "weight_decay": 0.3, "b1": 0.9, "b2": 0.9, "eps": 1e-3}
    path = ours(
        **case,
        **LETTER,
        block_size=3,
        block_mask={n: n in ("ragged", "stack") for n in SHAPES},
        weight_decay_mask={n: n == "tall" for n in SHAPES},
    )
    names = {"decay_names": {"tall"}, "diagonal_names": ("tall", "column")}
    expected = theirs(o.OrthoSophTiles(b=3, **case, **names))
    assert_close(path, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("block_size", "b2", "k", "rms", "nesterov"),
    [
        (1, 0.0, 1, None, False),
        (3, 0.9, 1, 0.2, True),
        (3, 0.9, 3, None, False),
        (4, 0, 3, 0.2, True),
    ],
)
def test_every_step_of_rows_is_the_recommended_reading(block_size, b2, k, rms, nesterov):
    case = {"learning_rate": 0.1, "b1": 0.9, "b2": b2, "b2_vector": 0.8, "eps": 1e-2, "rms": rms}
    case |= {"block_size": block_size, "update_interval": k, "nesterov": nesterov}
    expected = theirs(o.OrthoSophRows(**case))
    told = None
    if k > 1 and b2:  # told at the counts of k, by a counter of another interval
        case["update_interval"], told = 7, np.arange(STEPS) % k == 0
    assert_close(ours(**case, **PLAIN, refresh=told), expected, rtol=1e-10, atol=1e-12)


def test_masked_leaves_of_rows_are_adam():
    case = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.3, "b2_vector": 0.8}
    path = ours(**case, **PLAIN, block_mask=dict.fromkeys(SHAPES, False))
    adam = optax.scale_by_adam(0.9, 0.8, eps=0.0, nesterov=True)

    def step(carry, g):
        params, state = carry
        updates, state = adam.update(g, state)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        return (params, state), params

    with jax.enable_x64(True):
        run = jax.jit(lambda p: jax.lax.scan(step, (p, adam.init(p)), GRADS)[1])
        assert_close(path, run(PARAMS), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- the laws of whitening


def one_step(g, **arguments):
    """The output for a first gradient, in float64."""
    with jax.enable_x64(True):
        tx = scale_by_blocks(**{"rms": None, "mu_dtype": None, "eps": 0.0} | arguments)
        g = jnp.asarray(g)
        return np.asarray(jax.jit(lambda g: tx.update(g, tx.init(g))[0])(g))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_a_single_block_gives_the_polar_factor(shape):
    g = rng.normal(size=shape)
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    expected = max(shape) ** 0.5 * u @ vt
    np.testing.assert_allclose(one_step(g), expected, rtol=1e-9, atol=1e-9)
    scaled = one_step(g, rms=0.2, nesterov=False)
    np.testing.assert_allclose(scaled, 0.2 * expected, rtol=1e-9, atol=1e-9)


def test_rows_of_a_block_are_whitened():
    out = one_step(rng.normal(size=(8, 30)), block_size=4).reshape(2, 4, 30)
    second_moment = np.einsum("rbm,rcm->rbc", out, out) / 30
    np.testing.assert_allclose(second_moment, np.stack([np.eye(4)] * 2), atol=1e-9)


def test_output_turns_with_columns_and_moves_with_blocks():
    g, q = rng.normal(size=(6, 9)), np.linalg.qr(rng.normal(size=(9, 9)))[0]
    whitened = functools.partial(one_step, block_size=3, eps=0.1)
    out, close = whitened(g), functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    close(whitened(g @ q), out @ q)
    close(whitened(g[[3, 4, 5, 0, 1, 2]]), out[[3, 4, 5, 0, 1, 2]])
    close(whitened(g[[2, 1, 0, 4, 5, 3]]), out[[2, 1, 0, 4, 5, 3]])
    close(whitened(g.T), out.T)
    close(whitened(1e-3 * g), out)
    assert not np.allclose(whitened(g[[5, 1, 2, 3, 4, 0]]), out[[5, 1, 2, 3, 4, 0]])


@pytest.mark.parametrize("form", ["rows", "tiles"])
def test_stacked_matrices_are_each_apart(form):
    g = rng.normal(size=(2, 1, 5, 8)) * np.array([1.0, 1e-3]).reshape(2, 1, 1, 1)
    whitened = functools.partial(one_step, block_size=4, form=form, eps=0.1, rms=0.2)
    apart = np.stack([[whitened(x) for x in layer] for layer in g])
    np.testing.assert_allclose(whitened(g), apart, rtol=1e-9)
    np.testing.assert_allclose(np.sqrt(np.mean(apart**2, axis=(-2, -1))), 0.2, rtol=1e-9)


def test_gradients_that_grow_between_roots_do_not_make_long_steps():
    """A head that starts at zero gives its inputs a first gradient of zero."""
    tx, g = scale_by_blocks(rms=None, b1=0.0, b2=0.9, update_interval=10), GRADS["ragged"]
    g = jnp.asarray(g, jnp.float32)
    update = jax.jit(tx.update)
    for first in (0.0, 1e-12):
        state = tx.init(g[0])
        _, state = update(first * g[0], state)
        for x in g[1:9]:
            out, state = update(x, state)
            assert jnp.sqrt(jnp.mean(out**2)) < 3


@pytest.mark.parametrize("form", ["rows", "tiles"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
def test_a_block_whose_sample_is_not_finite_keeps_its_curvature(form, bad):
    g = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    tx = scale_by_blocks(block_size=4, form=form, b2=0.9, mu_dtype=None)
    grads = {"w": g, "v": g[:, 0]}
    spoilt = {"w": (2 * g).at[5, 3].set(bad), "v": (2 * g[:, 0]).at[2].set(bad)}
    update = jax.jit(tx.update)
    _, before = update(grads, tx.init(grads))
    _, after = update(spoilt, before)
    chex.assert_tree_all_finite(after.curvature)
    kept = jax.tree.map(lambda x, y: np.asarray(x == y), before.curvature, after.curvature)
    changed = jax.tree.map(lambda x: ~x, kept)
    assert changed["v"].sum() == 7 and kept["v"][2]
    if form == "tiles":
        assert kept["w"][1, 0].all() and changed["w"][0, 0].any()
    else:  # one block of the four columns, which are the rows
        assert kept["w"].all()


def test_a_block_that_overflows_stays_in_place_where_no_curvature_is_kept():
    g, tx = jnp.ones((4, 6)), scale_by_blocks(block_size=2)
    update = jax.jit(tx.update)
    for state in (tx.init(g), update(g, tx.init(g))[1]):
        updates, state = update(g.at[:2].set(1e25), state)
        assert (updates[:2] == 0).all() and (updates[2:] != 0).all()
        chex.assert_tree_all_finite((updates, state))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("embedding", [True, False], ids=["blocks", "numbers"])
def test_state_of_gpt2_125m_is_a_fraction_of_adamw(embedding):
    """Two bytes of momentum per parameter, and four of v in leaves that hold no matrix."""
    params = jax.eval_shape(split(PRESETS["gpt2-125m"]).init, jax.random.key(0))

    def mask(params):
        return jax.tree.map_with_path(
            lambda path, x: x.ndim == 2 and (embedding or "embedding" not in str(path)), params
        )

    def size(tx):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx, params)))

    numbers = jax.tree.map(lambda x, matrix: 0 if matrix else x.size, params, mask(params))
    adamw, ours = size(optax.adamw(0.1).init), size(orthosoph(0.1, block_mask=mask).init)
    scalars = 4 * (1 + sum(x > 0 for x in jax.tree.leaves(jax.tree.map(int, mask(params)))))
    total = sum(x.size for x in jax.tree.leaves(params))
    assert ours == 2 * total + 4 * sum(jax.tree.leaves(numbers)) + scalars
    assert ours < 0.6 * adamw


# ---------------------------------------------------------------- the contract

TREE = {"w": np.ones((5, 6)), "b": np.ones(6), "s": np.ones(())}


def abstract(tx, dtype="float32"):
    return jax.eval_shape(
        tx.init, {n: jax.ShapeDtypeStruct(x.shape, dtype) for n, x in TREE.items()}
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_state_is_what_the_next_update_uses(dtype):
    with jax.enable_x64(True):
        least = abstract(scale_by_blocks(block_size=2), dtype)
        most = abstract(scale_by_blocks(block_size=2, b2=0.9, update_interval=3), dtype)
        accumulated = jnp.promote_types(dtype, "float32")
        numbers = {"b": ((6,), accumulated), "s": ((), accumulated)}
        blocks = ((3, 1, 2, 2), accumulated)
        assert types(least.mu) == {n: (x.shape, "bfloat16") for n, x in TREE.items()}
        assert types(least.curvature) == numbers | {"w": ((), accumulated)} and least.root == ()
        assert types(most.curvature) == numbers | {"w": blocks}
        assert types(most.root["w"]) == blocks


@pytest.mark.parametrize("mask", [None, {"w": True, "b": False, "s": False}])
def test_map_params_finds_momentum_and_the_moments_of_numbers(mask):
    tx, names = scale_by_blocks(block_mask=mask), {n: n for n in TREE}
    mapped = optax.tree.map_params(
        tx, lambda _, name: name, abstract(tx), names, transform_non_params=lambda _: "count"
    )
    assert mapped == ("count", names, names, ())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"form": "columns"}, ValueError, "form='columns' is unknown; choose one of rows, tiles"),
        ({"b1": 1.0}, ValueError, r"b1=1.0 is outside \[0, 1\)"),
        ({"b2": -0.1}, ValueError, r"b2=-0.1 is outside \[0, 1\)"),
        ({"b2_vector": 1.0}, ValueError, r"b2_vector=1.0 is outside \[0, 1\)"),
        ({"eps": -1e-8}, ValueError, "eps=-1e-08 is outside"),
        ({"eps": float("nan")}, ValueError, "eps=nan is outside"),
        ({"block_size": 0}, ValueError, "block_size=0 must be an integer of at least 1"),
        ({"block_size": jnp.asarray(8)}, TypeError, "static_args=.'block_size'"),
        ({"update_interval": 0}, ValueError, "update_interval=0 must be an integer"),
        ({"mu_dtype": "int8"}, ValueError, "mu_dtype=int8 cannot hold an average"),
        ({"rms": 0.0}, ValueError, "None keeps steps at their own length"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        orthosoph(0.1, **arguments)


def test_a_mask_that_marks_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"`block_mask` selects \['b'\] of shape \(6,\)"):
        scale_by_blocks(block_mask=lambda p: jax.tree.map(lambda _: True, p)).init(TREE)
