"""The oracles are right: hand calculations, finite differences, enumeration and closed forms."""

import itertools

import numpy as np
import oracles as o
import pytest

close = np.testing.assert_allclose
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


def scalar_run(optimizer, x, grads, hessians=None, values=None):
    """Drive one number through the steps; returns every θ after the first."""
    hessians = hessians or [None] * len(grads)
    values = values or [None] * len(grads)
    path, params = [], {"x": np.array(x)}
    for g, h, value in zip(grads, hessians, values, strict=True):
        hessian = None if h is None else {"x": np.array(h)}
        params = optimizer.step(params, {"x": np.array(g)}, hessian, value=value)
        path.append(float(params["x"]))
    return path


def random_tree(seed, shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def flat(values):
    return np.concatenate([np.ravel(leaf) for leaf in values.values()])


# ---------------------------------------------------------------- averages


def test_average_is_the_weighted_sum_of_its_samples():
    average, samples = o.Average(0.7), np.random.default_rng(0).normal(size=5)
    for sample in samples:
        average.add({"x": sample})
    weights = 0.3 * 0.7 ** np.arange(4, -1, -1)
    close(average.value["x"], weights @ samples)
    close(average.mass, 1 - 0.7**5)
    close(average.read(True)["x"], weights @ samples / weights.sum())


def test_an_empty_average_reads_zero_when_debiased():
    average = o.Average(0.9)
    average.start({"x": np.ones(2)})
    close(average.read(True)["x"], [0, 0])


# ---------------------------------------------------------------- Sophia


def test_sophia_three_steps_by_hand():
    # β1 = β2 = .5, γ = .5, η = λ = .1, k = 2.
    # 1: m = 1, h = 4, ratio 1/2, θ = 1 - .01 - .05 = .94.
    # 2: m = -1.5, h still 4 (its sample, 99, is not due), ratio -.75, θ = .94 - .0094 + .075.
    # 3: m = -.25, h = (4 - 20)/2 = -8 < 0, ratio -.25/ε clipped to -1, θ = 1.0056 - .010056 + .1.
    sophia = o.Sophia(0.1, b1=0.5, b2=0.5, gamma=0.5, weight_decay=0.1, update_interval=2)
    close(scalar_run(sophia, 1.0, [2, -4, 1], [8, 99, -20]), [0.94, 1.0056, 1.095544], rtol=1e-14)
    close((sophia.m["x"], sophia.h["x"]), (-0.25, -8))


def test_sophia_bias_corrections_are_independent_and_by_mass():
    # m: 1, -1.5 over masses .5, .75 gives 2, -2. h: 4 over mass .5 gives 8, refreshed once.
    # γ = 1: ratios m/h.
    def run(**options):
        sophia = o.Sophia(1.0, b1=0.5, b2=0.5, gamma=1.0, update_interval=2, **options)
        return scalar_run(sophia, 0.0, [2, -4], [8, 8])

    close(run(), np.cumsum([-1 / 4, 1.5 / 4]))
    close(run(debias_momentum=True), np.cumsum([-2 / 4, 2 / 4]), atol=1e-15)
    close(run(debias_hessian=True), np.cumsum([-1 / 8, 1.5 / 8]))
    close(run(debias_momentum=True, debias_hessian=True), np.cumsum([-2 / 8, 2 / 8]), atol=1e-15)


def test_uncorrected_h_reaches_33_percent_after_400_steps():
    sophia = o.Sophia(0.0)
    scalar_run(sophia, 0.0, [1] * 400, [1] * 400)
    close(sophia.h["x"], 1 - 0.99**40)
    assert 0.33 < sophia.h["x"] < 0.332
    close(sophia.mass, sophia.h["x"])


def test_sophia_rejects_a_sample_with_one_bad_coordinate_whole():
    params = {"a": np.ones(2), "b": np.ones(())}
    sophia = o.Sophia(0.1, update_interval=1, debias_hessian=True)
    sophia.step(params, params, {"a": np.array([1.0, np.nan]), "b": np.ones(())})
    close(flat(sophia.h), 0)
    assert (sophia.rejected, sophia.mass) == (1, 0)
    sophia.step(params, params, params)
    close(flat(sophia.h), 0.01)
    sophia.step(params, params, {"a": np.ones(2), "b": np.array(np.inf)})
    close(flat(sophia.h), 0.01)
    assert sophia.rejected == 2 and np.isclose(sophia.mass, 0.01)


def test_sophia_refresh_flag_overrides_the_counter():
    sophia, one = o.Sophia(0.1, b2=0.5, update_interval=1), {"x": np.ones(1)}
    sophia.step(one, one, one, refresh=False)
    close(sophia.h["x"], 0)
    sophia.step(one, one, one, refresh=True)
    close(sophia.h["x"], 0.5)
    with pytest.raises(ValueError, match="refresh is due"):
        sophia.step(one, one)


def test_sophia_schedule_mask_and_absent_clip():
    # Step 0 has η = 1, step 1 has η = 2; ratio = g/h = 6/2 = 3 without clip, 1 with.
    params = {"decayed": np.full(2, 10.0), "free": np.full(2, 10.0)}
    grads, hessian = ({name: np.full(2, x) for name in params} for x in (6.0, 2.0))
    sophia = o.Sophia(
        lambda count: 1.0 + count,
        b1=0.0,
        b2=0.0,
        gamma=1.0,
        weight_decay=0.1,
        decay_names={"decayed"},
        clip_threshold=None,
    )
    params = sophia.step(params, grads, hessian)
    close(flat(params), [6, 6, 7, 7])  # 10 - 1 - 3, 10 - 3
    params = sophia.step(params, grads)
    close(flat(params), [-1.2, -1.2, 1, 1])  # 6 - 2 (.6) - 2 (3), 7 - 2 (3)
    assert sophia.win_rate() == 1.0


def test_win_rate_counts_the_coordinates_below_the_bound():
    sophia = o.Sophia(1.0, b1=0.0, b2=0.0, gamma=1.0)
    params = {"a": np.zeros(3), "b": np.zeros(())}
    grads = {"a": np.array([0.5, -0.5, 1.0]), "b": np.array(-7.0)}
    params = sophia.step(params, grads, o.tree(np.ones_like, grads))
    assert sophia.win_rate() == 0.5
    close(flat(params), [-0.5, 0.5, -1, 1])


def test_released_sophia_g_is_sign_descent_for_k_steps_then_uses_h():
    # k = 2, β1 = 0, β2 = .5, ρB = 2, η = .1, λ = .5: θ <- .95 θ - .1 sign(g) min(|g|/(2h), 1).
    # Steps 1, 2: h = 0. After step 2: h = .5 (4) = 2. Step 3: ratio 1/4. Step 4: -6/4 is capped.
    # After step 4: h = .5 (2 + 4) = 3. Step 5: ratio 3/6.
    released = o.ReleasedSophiaG(
        0.1, b1=0.0, b2=0.5, rho=0.5, B=4, weight_decay=0.5, update_interval=2
    )
    path = scalar_run(released, 1.0, [1e-3, -2, 1, -6, 3], [4, 4, 4, 4, 4])
    expected, x = [], 1.0
    for step in (1, -1, 0.25, -1, 0.5):
        x = 0.95 * x - 0.1 * step
        expected.append(x)
    close(path, expected)
    close(released.h["x"], 3)


# ---------------------------------------------------------------- Sophia-Lite and geometric


def test_sophia_lite_two_steps_by_hand():
    # β1 = β2 = .5, γ = 1.5, ε = 1, k = 2: m = 1, h = 1, ratio 1/2; m = -3.5, ratio -1.75 -> -1.5.
    lite = o.SophiaLite(0.1, b1=0.5, b2=0.5, gamma=1.5, eps=1.0, update_interval=2)
    close(scalar_run(lite, 0.0, [2, -8]), [-0.05, 0.1])
    # Corrected, ε = 0: 2/2, then m = -3.5/.75 over h = 1/.5.
    lite = o.SophiaLite(
        0.1,
        b1=0.5,
        b2=0.5,
        gamma=9.0,
        eps=0.0,
        update_interval=2,
        debias_momentum=True,
        debias_hessian=True,
    )
    close(scalar_run(lite, 0.0, [2, -8]), np.cumsum([-0.1, 0.1 * 3.5 / 0.75 / 2]))


def test_sophia_lite_defaults_refresh_every_20_steps_and_do_not_decay():
    lite = o.SophiaLite(0.0)
    scalar_run(lite, 1.0, [3.0] + [7.0] * 20)
    close(lite.h["x"], 0.95 * 0.05 * 3 + 0.05 * 7)
    assert (lite.b1, lite.weight_decay, lite.clip_threshold) == (0.9, 0.0, 1.0)


def test_sophia_geometric_uses_the_norm_of_the_whole_tree():
    # ‖(3, 0, 4)‖ = 5: samples 9/6, 0, 16/6, halved by β2 = .5.
    grads = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    geometric = o.SophiaGeometric(1.0, b1=0.5, b2=0.5, eps=1e-8)
    params = geometric.step(o.tree(np.zeros_like, grads), grads)
    close(flat(geometric.h), [0.75, 0, 4 / 3])
    close(flat(params), [-1, 0, -1])  # 1.5/.75 and 2/1.333 are clipped


def test_printed_geometric_min_leaves_negative_ratios_unbounded():
    # ρ = .5, g = -2: h = 4/3, m = -2, ratio -2/(2/3) = -3.
    def first(g, **options):
        geometric = o.SophiaGeometric(1.0, b1=0.0, b2=0.0, eps=0.0, rho=0.5, **options)
        return scalar_run(geometric, 0.0, [g])[0]

    assert first(-2.0) == 1.0 and first(2.0) == -1.0
    close((first(-2.0, two_sided=False), first(2.0, two_sided=False)), (3, -1))


# ---------------------------------------------------------------- OrthoSoph


def test_orthosoph_tile_step_is_the_polar_factor_without_memory():
    G = np.random.default_rng(1).normal(size=(4, 6))
    ortho = o.OrthoSophTiles(1.0, b=2, b1=0.0, b2=0.0, eps=0.0)
    step = -ortho.step({"w": np.zeros((4, 6))}, {"w": G})["w"]
    for i, j in itertools.product(range(2), range(3)):
        tile = np.s_[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        U, _, Vt = np.linalg.svd(G[tile])
        close(step[tile], U @ Vt, atol=1e-12)


def test_orthosoph_two_steps_by_hand():
    # β1 = β2 = .5, ε = 1. G1 = diag(2, 0): C = diag(2, 0), M = diag(1, 0), D = diag(1/√3, 0).
    # G2 = [[0, 0], [0, 4]]: C = diag(1, 8), M = diag(.5, 2), D = diag(.5/√2, 2/3).
    ortho = o.OrthoSophTiles(1.0, b=2, b1=0.5, b2=0.5, eps=1.0)
    params = {"w": np.zeros((2, 2))}
    params = ortho.step(params, {"w": np.diag([2.0, 0.0])})
    close(params["w"], -np.diag([3**-0.5, 0]))
    params = ortho.step(params, {"w": np.diag([0.0, 4.0])})
    close(params["w"], -np.diag([3**-0.5 + 0.5 * 2**-0.5, 2 / 3]))


def test_orthosoph_zero_padding_equals_a_smaller_last_tile():
    grads = random_tree(2, {"w": (5, 7)})
    zeros = o.tree(np.zeros_like, grads)
    whole = o.OrthoSophTiles(1.0, b=4, b1=0.5, b2=0.5, eps=1e-3).step(zeros, grads)["w"]
    for rows, columns in itertools.product((np.s_[:4], np.s_[4:]), repeat=2):
        G = grads["w"][rows, columns]
        C = 0.5 * G @ G.T + 1e-3 * np.eye(len(G))
        values, vectors = np.linalg.eigh(C)
        expected = vectors @ np.diag(values**-0.5) @ vectors.T @ (0.5 * G)
        close(-whole[rows, columns], expected, atol=1e-12)


def test_orthosoph_batches_stacked_matrices_and_treats_vectors_element_wise():
    stacked = random_tree(3, {"w": (2, 3, 4, 5)})
    options = {"b": 3, "b1": 0.0, "b2": 0.3, "eps": 1e-6}
    zeros = o.tree(np.zeros_like, stacked)
    whole = o.OrthoSophTiles(1.0, **options).step(zeros, stacked)["w"]
    for i, j in itertools.product(range(2), range(3)):
        single = o.OrthoSophTiles(1.0, **options)
        close(whole[i, j], single.step({"w": zeros["w"][i, j]}, {"w": stacked["w"][i, j]})["w"])
    vectors = random_tree(4, {"v": (5,), "scalar": (), "named": (2, 3)})
    ortho = o.OrthoSophTiles(1.0, diagonal_names=("named",), **options)
    step = ortho.step(o.tree(np.zeros_like, vectors), vectors)
    close(flat(step), -flat(vectors) / np.sqrt(0.7 * flat(vectors) ** 2 + 1e-6))


def test_tiles_invert():
    matrix = np.random.default_rng(5).normal(size=(2, 5, 8))
    tiles = o.to_tiles(matrix, 3)
    assert tiles.shape == (2, 2, 3, 3, 3)
    close(tiles[1, 0, 2], np.pad(matrix[1, :3, 6:], ((0, 0), (0, 1))))
    close(o.from_tiles(tiles, 5, 8), matrix)


# ---------------------------------------------------------------- SOAA and Tadam


def test_soaa_three_steps_by_hand():
    # β1 = β2 = .5, γ = .25, T = 2, η = .1, ε negligible.
    # 1: m̂ = 2, ŝ = 4, F = (1 + 4/4) 4 = 8, a = 2/8, θ = .975; dt = clip(0, [1, 2]) = 1;
    #    pr = .1 (2/4 - .5 (4)/16) = .0375.
    # 2: m̂ = 2/3, ŝ = 4/3, F = (1 + 1/3) 4/3 = 16/9 > √ŝ, a = 3/8, θ = .9375;
    #    l̂ = (.25 (3) + .5 (2.88))/.75 = 2.92, dt = .04/.0375 = 16/15 within [√.75, 1.5];
    #    pr = .1 (1/4 - .5 (4/3) 9/64) = .015625.
    # 3: m̂ = 18/7, ŝ = 68/7, F = 68/7 + 324/49 = 800/49, a = (18/7)/F = .1575, θ = .92175;
    #    l̂ = (.125 (3) + .25 (2.88) + .5 (2))/.875, l̂ - 2 = .39/.875, bounds [.75, 1.25]: dt = 1.25.
    soaa = o.SOAA(0.1, total_steps=2, b1=0.5, b2=0.5)
    path, x = [], {"x": np.array(1.0)}
    for g, value, dt in ((2, 3, 1), (0, 2.88, 16 / 15), (4, 2, 1.25)):
        x = soaa.step(x, {"x": np.array(g)}, value=value)
        path.append(float(x["x"]))
        close(soaa.dt, dt, rtol=1e-6)
    close(path, [0.975, 0.9375, 0.92175], rtol=1e-7)


def test_soaa_without_values_keeps_dt_and_decays_decoupled():
    # As above with λ = .5: θ = 1 - .05 - .025 = .925, then .925 - .04625 - .0375.
    soaa = o.SOAA(0.1, total_steps=2, b1=0.5, b2=0.5, weight_decay=0.5)
    close(scalar_run(soaa, 1.0, [2, 0]), [0.925, 0.84125], rtol=1e-7)
    assert (soaa.dt, soaa.pr) == (1.0, 0.0)


def test_soaa_sums_over_the_whole_tree():
    # First step: F = (1 + 3²+4²)/(3²+4²)) ŝ = 2 ŝ with one joint sum; √ŝ < F for both.
    grads = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    soaa = o.SOAA(1.0, total_steps=10)
    close(flat(soaa.step(o.tree(np.zeros_like, grads), grads)), [-3 / 18, -4 / 32], rtol=1e-7)
    mixed = {"a": np.array([3.0]), "b": np.array([[0.1]])}
    soaa = o.SOAA(1.0, total_steps=10)
    close(flat(soaa.step(o.tree(np.zeros_like, mixed), mixed)), [-3 / 18, -1.0], rtol=1e-6)


def test_soaa_at_small_gradients_is_adam_times_dt_in_three_quarters_to_two():
    rng, T = np.random.default_rng(6), 60
    scales = {"a": rng.uniform(1e-4, 1e-2, 5), "b": rng.uniform(1e-4, 1e-2, (2, 3))}
    gradients = [o.tree(lambda s: s * rng.normal(size=s.shape), scales) for _ in range(T)]
    soaa = o.SOAA(1e-3, total_steps=T)
    params, radii = o.tree(np.zeros_like, scales), []
    for t in range(1, T + 1):
        radii.append(soaa.dt)
        params = soaa.step(params, gradients[t - 1], value=4 - 0.01 * t + 0.05 * rng.normal())
        history = np.stack([flat(g) for g in gradients[:t]])
        m, s = (
            b ** np.arange(t - 1, -1, -1) @ x * (1 - b) / (1 - b**t)
            for b, x in ((0.9, history), (0.999, history**2))
        )
        close(flat(soaa.direction), radii[-1] * m / (np.sqrt(s) + 1e-8), rtol=1e-10)
    assert min(radii) >= 0.75 and max(radii) <= 2 and len({round(r, 6) for r in radii}) > 3


def test_tadam_three_radii_by_hand():
    # β1 = β2 = .5, γ = .25, T = 2, η = .1, ε = 1 (so v0 = 1).
    # 1: dt = 1; v = .5, v̂ = 1, m̂ = 2, ŝ = 4, F = (1 + 4/2) 1 = 3 > 2, a = 2/(3 + 1), θ = .95;
    #    pr = .1 (1 - .5 (1 + .25)) = .0375.
    # 2: ρ̂ = (3 - 2)/1 > .75: dt = 1.5; dv = 4 (.25/.75), v = .25 + 2/3, v̂ = 11/9, m̂ = 2/3,
    #    F = (1 + (4/9)/(20/9)) 11/9 = 22/15, dt F = 2.2 > √(4/3), a = 1/3.2, θ = .95 - .03125;
    #    pr = .1 (5/24 - .5 (25/576 + (11/9)(25/256))).
    # 3: l̂ = 7/3, ρ̂ = 2/15 < .25: dt = .75 (1.5) = 1.125 within [.75, 1.25].
    tadam = o.Tadam(0.1, total_steps=2, b1=0.5, b2=0.5, eps=1.0)
    x = {"x": np.array(1.0)}
    x = tadam.step(x, {"x": np.array(2.0)}, value=3.0)
    close((x["x"], tadam.dt, tadam.pr), (0.95, 1, 0.0375))
    x = tadam.step(x, {"x": np.array(0.0)}, value=2.0)
    expected = 0.1 * (5 / 24 - 0.5 * (25 / 576 + 11 / 9 * 25 / 256))
    close((x["x"], tadam.dt, tadam.pr), (0.91875, 1.5, expected))
    tadam.step(x, {"x": np.array(0.0)}, value=2.2)
    close(tadam.dt, 1.125)


def test_tadam_factor_is_one_between_gamma_and_one_minus_gamma():
    # As above, but ρ̂ = (3 - 2.5)/1.
    tadam = o.Tadam(0.1, total_steps=2, b1=0.5, b2=0.5, eps=1.0)
    scalar_run(tadam, 1.0, [2, 0], values=[3, 2.5])
    assert tadam.dt == 1.0


def test_tadam_first_loss_leaves_dt_alone_even_when_negative():
    tadam = o.Tadam(0.1, total_steps=2)
    scalar_run(tadam, 1.0, [2], values=[-3])
    assert tadam.dt == 1.0


def test_tadam_second_moment_is_the_exactly_weighted_variance():
    grads, b, eps = np.random.default_rng(7).normal(3, 2, size=(9, 4)), 0.8, 1e-8
    tadam, params = o.Tadam(0.1, total_steps=20, b1=b, b2=b, eps=eps), {"x": np.zeros(4)}
    for t in range(1, 10):
        params = tadam.step(params, {"x": grads[t - 1]})
        w = (1 - b) * b ** np.arange(t - 1, -1, -1)[:, None] / (1 - b**t)
        mean = (w * grads[:t]).sum(0)
        variance = (w * (grads[:t] - mean) ** 2).sum(0)
        close(tadam.v_hat["x"], variance + eps * b**t / (1 - b**t), rtol=1e-10)


# ---------------------------------------------------------------- estimators


def test_rademacher_hutchinson_is_exact_in_mean_with_the_off_diagonal_variance():
    A = np.random.default_rng(8).normal(size=(5, 5))
    H = A + A.T
    probes = np.array(list(itertools.product((-1.0, 1.0), repeat=5)))
    samples = np.stack([o.hutchinson({"x": u}, {"x": H @ u})["x"] for u in probes])
    close(samples.mean(0), np.diag(H))
    close(samples.var(0), (H**2).sum(1) - np.diag(H) ** 2)


def test_normal_hutchinson_adds_twice_the_squared_diagonal_to_the_variance():
    # Three Gauss-Hermite nodes match a normal's moments up to the fifth.
    A = np.random.default_rng(9).normal(size=(4, 4))
    H = A + A.T
    nodes = list(itertools.product(((0, 2 / 3), (3**0.5, 1 / 6), (-(3**0.5), 1 / 6)), repeat=4))
    probability = np.array([np.prod([p for _, p in node]) for node in nodes])
    probes = np.array([[u for u, _ in node] for node in nodes])
    samples = np.stack([o.hutchinson({"x": u}, {"x": H @ u})["x"] for u in probes])
    mean = probability @ samples
    close(mean, np.diag(H), atol=1e-12)
    close(probability @ (samples - mean) ** 2, (H**2).sum(1) + np.diag(H) ** 2)


def test_simple_estimators_by_hand():
    g = {"a": np.array([3.0]), "b": np.array([-4.0])}
    close(flat(o.squared_gradient(g)), [9, 16])
    close(flat(o.squared_gradient(g, 2)), [18, 32])
    close(flat(o.gauss_newton_bartlett(g, 2)), [18, 32])
    close(flat(o.gradient_magnitude(g)), [3, 4])
    close(flat(o.weighted_squared_gradient(g)), [1.5, 16 / 6])
    close(flat(o.grouped_gnb([g, g, o.tree(np.zeros_like, g)], 6)), [3, 16 / 3])


def enumerated(weights, estimate):
    """E over all label combinations of estimate([(W, labels, weights, X) by sequence])."""
    rng = np.random.default_rng(10)
    X, params = rng.normal(size=(3, 2, 2)), {"W": rng.normal(size=(2, 3))}
    model = o.ExactLinear("categorical", X, weights)
    p = o.softmax(model.outputs(params)).reshape(-1, 3)
    expectation = 0.0
    for labels in itertools.product(range(3), repeat=6):
        probability = np.prod(p[range(6), labels])
        expectation += probability * estimate(params, X, np.reshape(labels, (3, 2)))["W"]
    return expectation, model.gauss_newton_diagonal(params)["W"]


GROUPS = ((0,), (1, 2), ())
BINARY = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
FRACTIONAL = np.array([[0.3, 0.0], [1.0, 0.5], [0.2, 2.0]])


def group_sums(weights, params, X, labels, power):
    rows = [np.array(group, int) for group in GROUPS]
    models = [o.ExactLinear("categorical", X[r], weights[r]) for r in rows]
    return [m.summed_sample(params, labels[r], power) for m, r in zip(models, rows, strict=True)]


@pytest.mark.parametrize("weights", [BINARY, FRACTIONAL])
def test_grouped_gnb_mean_is_exact_gauss_newton_diagonal(weights):
    mean, exact = enumerated(
        weights,
        lambda params, X, labels: o.grouped_gnb(
            group_sums(weights, params, X, labels, 0.5), weights.sum()
        ),
    )
    close(mean, exact, rtol=1e-12)


def test_paper_gnb_mean_is_exact_gauss_newton_diagonal_with_padding():
    def estimate(params, X, labels):
        mean_gradient = o.ExactLinear("categorical", X, BINARY).gradient(params, labels)
        return o.gauss_newton_bartlett(mean_gradient, BINARY.sum())

    mean, exact = enumerated(BINARY, estimate)
    close(mean, exact, rtol=1e-12)


def test_averaging_group_estimates_is_biased_for_unequal_counts():
    counts = [BINARY[list(group)].sum() for group in GROUPS[:2]]

    def estimate(params, X, labels):
        sums = group_sums(BINARY, params, X, labels, 0.5)[:2]
        single = [
            o.gauss_newton_bartlett(o.tree(lambda s, B=B: s / B, s), B)
            for s, B in zip(sums, counts, strict=True)
        ]
        return o.tree(lambda a, b: (a + b) / 2, *single)

    mean, exact = enumerated(BINARY, estimate)
    assert np.abs(mean / exact - 1).max() > 0.1


def test_cotangents_times_w_are_biased_for_fractional_weights():
    mean, exact = enumerated(
        FRACTIONAL,
        lambda params, X, labels: o.grouped_gnb(
            group_sums(FRACTIONAL, params, X, labels, 1.0), FRACTIONAL.sum()
        ),
    )
    assert np.abs(mean / exact - 1).max() > 0.1


# ---------------------------------------------------------------- exact models


def make(kind, likelihood, weighted=True):
    """A small model, its parameters and labels; weights include a zero and fractions."""
    rng = np.random.default_rng(11)
    X, V = rng.normal(size=(3, 2, 4)), 3
    counted = (3, 2, V) if likelihood == "bernoulli" else (3, 2)
    weights = rng.uniform(0, 2, counted) * (rng.random(counted) > 0.2) if weighted else None
    y = {
        "categorical": rng.integers(V, size=(3, 2)),
        "bernoulli": rng.integers(2, size=(3, 2, V)),
        "gaussian": rng.normal(size=(3, 2, V)),
    }[likelihood]
    if kind == "linear":
        return o.ExactLinear(likelihood, X, weights), random_tree(12, {"W": (4, V)}), y
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, V), "b2": (V,)}
    return o.ExactTanh(likelihood, X, weights), random_tree(13, shapes), y


def probabilities(likelihood, f):
    """[(p(y|f) in the shape of what B counts, y)] over every value y of one discrete output."""
    if likelihood == "categorical":
        odds = np.exp(f) / np.exp(f).sum(-1, keepdims=True)
        return [(odds[..., v], np.full(f.shape[:-1], v)) for v in range(f.shape[-1])]
    odds = 1 / (1 + np.exp(-f))
    return [(odds, np.ones_like(f)), (1 - odds, np.zeros_like(f))]


@pytest.mark.parametrize("likelihood", LIKELIHOODS[:2])
def test_discrete_losses_are_minus_log_probability(likelihood):
    f = np.random.default_rng(14).normal(size=(3, 2, 4))
    for p, y in probabilities(likelihood, f):
        close(o.output_losses(likelihood, f, y), -np.log(p))


def test_losses_stay_finite_at_large_outputs():
    f = np.array([[1e4, -1e4]])
    close(o.output_losses("categorical", f, np.array([1])), 2e4)
    close(o.output_losses("bernoulli", f, np.array([[0, 1]])), 1e4)
    close(o.sigmoid(f), [[1, 0]])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["linear", "tanh"])
def test_gradient_matches_central_differences_of_the_loss(kind, likelihood):
    model, params, y = make(kind, likelihood)
    numeric = o.central_difference(lambda p: model.loss(p, y), params)
    close(flat(model.gradient(params, y)), numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_linear_hessian_matches_central_differences_of_the_gradient(likelihood):
    model, params, y = make("linear", likelihood)
    numeric = o.central_difference(lambda p: flat(model.gradient(p, y)), params)
    close(model.hessian(params), numeric, rtol=1e-6, atol=1e-9)
    close(flat(model.hessian_diagonal(params)), np.diag(numeric), rtol=1e-6, atol=1e-9)


def test_tanh_jacobian_matches_central_differences_of_the_outputs():
    model, params, _ = make("tanh", "gaussian")
    numeric = o.central_difference(model.outputs, params)
    jacobian = model.jacobian(params)
    ours = np.concatenate([jacobian[name].reshape(3, 2, 3, -1) for name in params], -1)
    close(np.moveaxis(ours, -1, 0), numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["linear", "tanh"])
def test_gauss_newton_diagonal_is_the_fisher_by_enumeration(kind, likelihood):
    """Σ_n w_n E_y[(∂ℓ_n/∂θ)²] / Σw, ∂ℓ_n by differences; Gaussian: E = Σ_v (∂f_v/∂θ)²."""
    model, params, _ = make(kind, likelihood)
    if likelihood == "gaussian":
        squares = (o.central_difference(model.outputs, params) ** 2).sum(-1)
    else:
        squares = sum(
            p
            * o.central_difference(
                lambda q, y=y: o.output_losses(likelihood, model.outputs(q), y), params
            )
            ** 2
            for p, y in probabilities(likelihood, model.outputs(params))
        )
    axes = tuple(range(1, squares.ndim))
    fisher = (model.weights * squares).sum(axes) / model.weights.sum()
    close(flat(model.gauss_newton_diagonal(params)), fisher, rtol=1e-6, atol=1e-9)


def test_categorical_linear_gauss_newton_diagonal_is_x_squared_p_one_minus_p():
    model, params, _ = make("linear", "categorical")
    p = o.softmax(model.outputs(params))
    closed = np.einsum("bt,bti,btv->iv", model.weights, model.X**2, p * (1 - p))
    close(model.gauss_newton_diagonal(params)["W"], closed / model.weights.sum())


def test_default_weights_count_every_output_once():
    for likelihood, counted in zip(LIKELIHOODS, (6, 18, 6), strict=True):
        model, params, y = make("linear", likelihood, weighted=False)
        losses = o.output_losses(likelihood, model.outputs(params), y)
        assert losses.size == counted
        close(model.loss(params, y), losses.mean())


def test_weights_of_the_wrong_shape_are_refused():
    model, params, y = make("linear", "bernoulli")
    model.weights = np.ones((3, 2))
    with pytest.raises(ValueError, match="weights have shape"):
        model.loss(params, y)


# ---------------------------------------------------------------- the 2-D toy


def test_toy_derivatives_match_central_differences():
    for point in np.random.default_rng(15).uniform(-2, 5, size=(8, 2)):
        theta = {"x": point}
        gradient = o.central_difference(lambda p: o.toy_loss(p["x"]), theta)
        hessian = o.central_difference(lambda p: o.toy_gradient(p["x"]), theta)
        close(o.toy_gradient(point), gradient, rtol=1e-6, atol=1e-6)
        close(o.toy_hessian(point), hessian, rtol=1e-6, atol=1e-6)


def test_toy_stationary_points_are_two_minima_and_a_saddle():
    for point in (o.TOY_MINIMUM, o.TOY_SADDLE, o.TOY_LOCAL_MINIMUM):
        close(o.toy_gradient(point), 0, atol=1e-14)
    close(np.diag(o.toy_hessian(o.TOY_MINIMUM)), [68.8, 1])
    close(np.diag(o.toy_hessian(o.TOY_SADDLE)), [-27.2, 1])
    assert (np.diag(o.toy_hessian(o.TOY_LOCAL_MINIMUM)) > 0).all()
    assert o.toy_loss(o.TOY_MINIMUM) == 0 and round(o.toy_loss(o.TOY_LOCAL_MINIMUM), 2) == 5.43


def test_toy_is_concave_in_theta1_only_between_the_stated_ends():
    x = np.linspace(-1, 1, 2001)
    concave = x[[o.toy_hessian((a, 0))[0, 0] < 0 for a in x]]
    close((concave[0], concave[-1]), (-0.3655, 0.5963), atol=1.5e-3)
    assert len(concave) == np.count_nonzero((x >= concave[0]) & (x <= concave[-1]))


def test_from_the_toy_start_newton_finds_the_saddle_and_sophia_the_minimum():
    newton, params = np.array([0.2, 0.0]), {"x": np.array([0.2, 0.0])}
    sophia = o.Sophia(0.2, b1=0.0, b2=0.0, gamma=1.0, update_interval=1)
    for _ in range(100):
        newton = newton - np.linalg.solve(o.toy_hessian(newton), o.toy_gradient(newton))
        x = params["x"]
        curvature = {"x": np.diag(o.toy_hessian(x))}
        params = sophia.step(params, {"x": o.toy_gradient(x)}, curvature)
    close(newton, o.TOY_SADDLE, atol=1e-9)
    close(params["x"], o.TOY_MINIMUM, atol=1e-6)
