"""The oracles of sections 2 to 4 and the max form are right: two and three steps by hand."""

import numpy as np
import oracles as o
import pytest
from oracles import scalar_run
from trees import flat

close = np.testing.assert_allclose


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


# ---------------------------------------------------------------- the max form


def test_max_form_two_steps_by_hand():
    # β1 = β2 = β2v = .5, γ = .3, ε = 1, c = .5, k = 2; all averages debiased; ĥ = 8, γĥ = 2.4.
    # 1: m̂ = 2, v̂ = 4, max(2.4, 2) + 1 = 3.4, ratio 2/3.4 > .5.
    # 2: m̂ = -1.5/.75 = -2, v̂ = (1 + 8)/.75 = 12, max(2.4, √12) + 1, ratio -2/(√12 + 1) > -.5.
    form = o.MaxForm(
        0.1, b1=0.5, b2=0.5, b2v=0.5, gamma=0.3, eps=1.0, clip_threshold=0.5, update_interval=2
    )
    close(scalar_run(form, 1.0, [2], [8]), [0.95])
    assert form.win_rate() == 0
    close(scalar_run(form, 0.95, [-4], [99]), [0.95 + 0.2 / (12**0.5 + 1)])
    assert form.win_rate() == 1
    close((form.h["x"], form.v["x"]), (4, 9))


def test_max_form_is_adam_without_curvature_and_newton_with_much():
    grads = np.random.default_rng(20).normal(size=(7, 4))
    options = {"b1": 0.8, "b2": 0.5, "b2v": 0.9, "clip_threshold": None, "update_interval": 1}
    adam, newton = (o.MaxForm(1.0, gamma=gamma, **options) for gamma in (0.0, 1e6))
    for t in range(1, 8):
        g, hessian = {"x": grads[t - 1]}, {"x": np.full(4, float(t))}
        first, second = (form.direct(g, hessian)["x"] for form in (adam, newton))
        m, v = (
            b ** np.arange(t - 1, -1, -1) @ x * (1 - b) / (1 - b**t)
            for b, x in ((0.8, grads[:t]), (0.9, grads[:t] ** 2))
        )
        h = 0.5 ** np.arange(t, 0, -1) @ np.arange(1, t + 1) / (1 - 0.5**t)
        close(first, m / (np.sqrt(v) + 1e-8), rtol=1e-12)
        close(second, m / (1e6 * h), rtol=1e-12)


# ---------------------------------------------------------------- within a radius


def test_sophia_within_a_radius_keeps_newton_steps_and_scales_all_others():
    # γ = .5, ε = .1, c = 1, dt = 3. h = 4: 3 (1)/max(6, ε) = m/(γh). h = 1: 3 (5)/1.5 = 10 -> 3.
    # h = 0: 3 (.01)/.1 = .3, a radius times the ratio .1. h = -1 is floored too: 3/.1 -> 3.
    sophia = o.Sophia(1.0, b1=0.0, b2=0.0, gamma=0.5, eps=0.1)
    g, h = np.array([1.0, 5.0, 0.01, 1.0]), np.array([4.0, 1.0, 0.0, -1.0])
    close(sophia.direct({"x": g}, {"x": h}, dt=3.0)["x"], [0.5, 3, 0.3, 3])
    close(sophia.linear, 0.5 + 15 + 0.003 + 3)
    close(sophia.quadratic, 4 * 0.25 + 9 + 0 - 9)
    assert sophia.win_rate() == 0.5


def test_other_ratios_within_a_radius_by_hand():
    # dt = 2, m = 6: Lite 2 (6)/(2 (1) + 1) = 4 -> 2 (1.5). Geometric, ρ = .5, h = 36/7: 12/(36/7),
    # of which the printed min(·, dt) bounds the positive one. Max form, √v̂ = 6 > 2 γ h: 12/(6 + 1).
    def first(rule, g=6.0, h=1.0):
        return float(rule.direct({"x": np.array(g)}, {"x": np.array(h)}, dt=2.0)["x"])

    still = {"b1": 0.0, "b2": 0.0}
    close(first(o.SophiaLite(1.0, gamma=1.5, eps=1.0, **still)), 3)
    one_sided = o.SophiaGeometric(1.0, rho=0.5, eps=0.0, two_sided=False, **still)
    close(first(one_sided, -6.0, 36 / 7), -7 / 3)
    close(first(one_sided, 6.0, 36 / 7), 2)
    form = o.MaxForm(1.0, gamma=1.0, eps=1.0, clip_threshold=9.0, **still)
    close(first(form), 12 / 7)
    close((form.linear, form.quadratic), (72 / 7, 144 / 49))


def test_the_predicted_gain_uses_the_corrected_averages():
    # β1 = β2 = .5: m̂ = 2, ĥ = 8 from m = 1, h = 4; γ = .5, a = 2/4.
    options = {"b1": 0.5, "b2": 0.5, "gamma": 0.5}
    sophia = o.Sophia(1.0, debias_momentum=True, debias_hessian=True, **options)
    scalar_run(sophia, 0.0, [2], [8])
    close((sophia.linear, sophia.quadratic), (1, 2))
    sophia = o.Sophia(1.0, **options)
    scalar_run(sophia, 0.0, [2], [8])
    close((sophia.linear, sophia.quadratic), (0.5, 1))
