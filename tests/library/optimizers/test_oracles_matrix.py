"""The OrthoSoph oracles are right: polar factors, and steps that were worked out by hand."""

import itertools

import numpy as np
import oracles as o
import pytest
from oracles_matrix import from_tiles, to_tiles
from trees import flat, random_tree, unflatten

close = np.testing.assert_allclose


def polar(G):
    """U Vᵀ."""
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    return U @ Vt


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


# ---------------------------------------------------------------- tiles


def test_tiles_without_memory_are_polar_factors():
    G = normal(1, (4, 6))
    step = -o.OrthoSophTiles(1.0, b=2, b1=0.0, b2=0.0, eps=0.0).step({"w": 0 * G}, {"w": G})["w"]
    for i, j in itertools.product(range(2), range(3)):
        tile = np.s_[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        close(step[tile], polar(G[tile]), atol=1e-12)


def test_tiles_two_steps_by_hand():
    # β1 = β2 = .5, ε = 1. G1 = diag(2, 0): C = diag(2, 0), M = diag(1, 0), D = diag(1/√3, 0).
    # G2 = [[0, 0], [0, 4]]: C = diag(1, 8), M = diag(.5, 2), D = diag(.5/√2, 2/3).
    ortho = o.OrthoSophTiles(1.0, b=2, b1=0.5, b2=0.5, eps=1.0)
    params = ortho.step({"w": np.zeros((2, 2))}, {"w": np.diag([2.0, 0.0])})
    close(params["w"], -np.diag([3**-0.5, 0]))
    params = ortho.step(params, {"w": np.diag([0.0, 4.0])})
    close(params["w"], -np.diag([3**-0.5 + 0.5 * 2**-0.5, 2 / 3]))


def test_tiles_are_filled_with_zeros_at_the_edges():
    matrix = normal(5, (2, 5, 8))
    tiles = to_tiles(matrix, 3)
    assert tiles.shape == (2, 2, 3, 3, 3)
    close(tiles[1, 0, 2], np.pad(matrix[1, :3, 6:], ((0, 0), (0, 1))))
    close(from_tiles(tiles, 5, 8), matrix)


def test_tiles_batch_stacked_matrices_and_treat_vectors_elementwise():
    stacked = random_tree(3, {"w": (2, 4, 5)})
    options = {"b": 3, "b1": 0.0, "b2": 0.3, "eps": 1e-6}
    whole = o.OrthoSophTiles(1.0, **options).direct(stacked)["w"]
    for i in range(2):
        close(whole[i], o.OrthoSophTiles(1.0, **options).direct({"w": stacked["w"][i]})["w"])
    vectors = random_tree(4, {"v": (5,), "scalar": (), "named": (2, 3)})
    direction = o.OrthoSophTiles(1.0, diagonal_names=("named",), **options).direct(vectors)
    close(flat(direction), flat(vectors) / np.sqrt(0.7 * flat(vectors) ** 2 + 1e-6))


# ---------------------------------------------------------------- rows


def rows_direction(w, **options):
    return o.OrthoSophRows(1.0, **({"b1": 0.0, "eps": 1e-13} | options)).direct({"w": w})["w"]


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4)])
def test_one_block_without_memory_is_the_polar_factor_times_the_root_of_the_long_side(shape):
    G = normal(21, shape)
    expected = max(shape) ** 0.5 * polar(G)
    close(rows_direction(G, block_size=9), expected, rtol=1e-9)
    # The rows of a polar factor are unit vectors, so its root mean square is that root's inverse.
    close(rows_direction(G, block_size=9, rms=0.2), 0.2 * expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(5, 8), (5, 5), (8, 5)])
def test_each_group_along_the_short_side_is_its_own_polar_factor_and_the_last_is_smaller(shape):
    G = normal(22, shape)
    wide = G.T if shape[0] > shape[1] else G
    expected = max(shape) ** 0.5 * np.concatenate([polar(wide[i : i + 2]) for i in (0, 2, 4)])
    close(rows_direction(G, block_size=2), expected if wide is G else expected.T, rtol=1e-9)


def test_rows_three_steps_by_hand():
    # β1 = β2 = .5, no look ahead, ε = .2, k = 2, m = 2. G = diag(√6, √8), then 0, then
    # G3 = diag(√6, 0).
    # 1: N = G: Ĉ = diag(3, 4), of norm 5: Z = (diag(3, 4)/5 + .2)^(-1/2) = diag(4, 5)^(-1/2) √5.
    # 2: not due: N = (.25 G)/.75 = G/3, n nᵀ/m = diag(3, 4)/9; Ĉ = (.25 + .5/9)/.75 diag(3, 4)
    #    = 11/27 diag(3, 4), of norm 5 * 11/27: R is √(27/11) times the first.
    # 3: M = .125 G + .5 G3, N = M/.875 = diag(√6 5/7, √8/7); n nᵀ/m = diag(3 * 25, 4)/49.
    #    Ĉ = ((.125 + .25/9) diag(3, 4) + .5 diag(75, 4)/49)/.875.
    # λ = .1, η = .5: θ <- .95 θ - .5 direction.
    options = {"b1": 0.5, "b2": 0.5, "eps": 0.2, "update_interval": 2, "nesterov": False}
    rows = o.OrthoSophRows(0.5, block_size=8, weight_decay=0.1, **options)
    G, G3 = np.diag([6**0.5, 8**0.5]), np.diag([6**0.5, 0])
    first = np.diag([6**0.5 / 2, 8**0.5 / 5**0.5])
    C = ((0.125 + 0.25 / 9) * np.array([3, 4]) + 0.5 * np.array([75, 4]) / 49) / 0.875
    N = np.array([6**0.5 * 5 / 7, 8**0.5 / 7])
    third = np.diag(N / np.sqrt(C + 0.2 * np.hypot(*C)))
    params, expected = {"w": np.eye(2)}, np.eye(2)
    for g, direction in ((G, first), (0 * G, (27 / 11) ** 0.5 / 3 * first), (G3, third)):
        params = rows.step(params, {"w": g})
        expected = 0.95 * expected - 0.5 * direction
        close(params["w"], expected)


def test_rows_look_ahead_to_the_next_average_if_the_gradient_came_again():
    gs, b1 = normal(32, (4, 3, 5)), 0.7
    ahead = o.OrthoSophRows(1.0, block_size=3, b1=b1, eps=1e-13)
    for t, g in enumerate(gs, start=1):
        # Sums of weights: each part is an average of its own.
        weights = (1 - b1) * b1 ** np.arange(t, 0, -1)
        part = np.tensordot(weights, gs[:t], 1) / (1 - b1 ** (t + 1))
        N = part + (1 - b1) / (1 - b1**t) * g
        close(ahead.direct({"w": g})["w"], 5**0.5 * polar(N), rtol=1e-9)


def test_refresh_says_when_the_shape_of_the_root_is_taken_and_the_average_goes_on():
    gs, flags = normal(24, (3, 2, 6)), (None, False, True)
    rows = o.OrthoSophRows(1.0, block_size=2, b1=0.0, b2=0.5, eps=1e-3, update_interval=1)
    got = [rows.direct({"w": g}, refresh=flag)["w"] for g, flag in zip(gs, flags, strict=True)]
    first, second, third = (g @ g.T / 6 for g in gs)
    middle = (0.25 * first + 0.5 * second) / 0.75
    late = (0.125 * first + 0.25 * second + 0.5 * third) / 0.875

    def root(C):
        values, vectors = np.linalg.eigh(C + 1e-3 * np.sqrt((C**2).sum()) * np.eye(2))
        return vectors @ np.diag(values**-0.5) @ vectors.T

    scale = (np.sum(first**2) / np.sum(middle**2)) ** 0.25
    for ours, R, g in zip(got, (root(first), scale * root(first), root(late)), gs, strict=True):
        close(ours, R @ g, rtol=1e-10)


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6, 4)])
def test_rows_treat_a_batch_of_matrices_one_by_one_root_mean_square_included(shape):
    W = normal(26, shape) * np.array([1, 5]).reshape(2, 1, 1)
    options = {"block_size": 3, "eps": 0.1, "rms": 0.2}
    whole = rows_direction(W, **options)
    for i in range(2):
        close(whole[i], rows_direction(W[i], **options))
        close((whole[i] ** 2).mean(), 0.04)


def test_rows_ignore_the_scale_of_a_block_and_stay_where_it_is_zero():
    # ε is relative to the curvature, each block to its own.
    G = normal(27, (4, 6))
    options = {"block_size": 2, "eps": 0.3}
    scaled = np.repeat([1e-9, 1e3], 2)[:, None] * G
    close(rows_direction(scaled, **options), rows_direction(G, **options), rtol=1e-10)
    G[:2] = 0
    direction = rows_direction(G, **options, rms=0.2)
    close(direction[:2], 0)
    close((direction**2).mean(), 0.04)
    close(rows_direction(0 * G, **options, rms=0.2), 0)


def test_vectors_and_named_leaves_of_rows_take_adams_direction():
    like, history = random_tree(0, {"v": (5,), "scalar": (), "named": (2, 3)}), normal(29, (4, 12))
    options = {"block_size": 2, "b1": 0.8, "b2": 0.3, "b2_vector": 0.6, "nesterov": False}
    rows = o.OrthoSophRows(1.0, rms=0.2, diagonal_names=("named",), **options)
    for t in range(1, 5):
        direction = rows.direct(unflatten(history[t - 1], like))
        m, v = (
            b ** np.arange(t - 1, -1, -1) @ x * (1 - b) / (1 - b**t)
            for b, x in ((0.8, history[:t]), (0.6, history[:t] ** 2))
        )
        close(flat(direction), m / np.sqrt(v))
