"""The oracles reproduce updates that were worked out by hand."""

import numpy as np
import oracles as o
import pytest
from oracles import scalar_run
from trees import flat

close = np.testing.assert_allclose


class Sign:
    """A direction that does not know the radius."""

    def direct(self, grads, hessian=None, refresh=None):
        return o.tree(np.sign, grads)


HALF = {"b1": 0.5, "b2": 0.5}
SOPHIA = HALF | {"gamma": 1.0, "update_interval": 2}
LITE = HALF | {"gamma": 1.5, "eps": 1.0, "update_interval": 2}
SOAA = HALF | {"total_steps": 2}
TADAM = SOAA | {"eps": 1.0}
REGION = {"total_steps": 2, "b1": 0.5}
DEBIASED = {"debias_momentum": True, "debias_hessian": True}


def geometric(two_sided):
    return o.SophiaGeometric(1.0, b1=0.0, b2=0.0, eps=0.0, rho=0.5, two_sided=two_sided)


def case(oracle, x, grads, path=None, samples=None, losses=None, **last):
    """One parameter, its path under an oracle, and attributes of the oracle at the end."""
    return pytest.param(oracle, (x, grads, samples, losses), path, last, id=type(oracle).__name__)


BY_HAND = [
    # γ = .5, η = λ = .1, k = 2.
    # 1: m = 1, h = 4, ratio 1/2, θ = 1 - .01 - .05 = .94.
    # 2: m = -1.5, h still 4 (its sample, 99, is not due), ratio -.75, θ = .94 - .0094 + .075.
    # 3: m = -.25, h = (4 - 20)/2 = -8 < 0, ratio -.25/ε clipped to -1, θ = 1.0056 - .010056 + .1.
    case(
        o.Sophia(0.1, weight_decay=0.1, **(SOPHIA | {"gamma": 0.5})),
        1.0,
        [2, -4, 1],
        [0.94, 1.0056, 1.095544],
        samples=[8, 99, -20],
        m=-0.25,
        h=-8,
    ),
    # m: 1, -1.5 over masses .5, .75 gives 2, -2. h: 4 over mass .5 gives 8, refreshed once.
    # γ = 1: ratios m/h, whose gain m a and curvature h a² are those of the last step.
    case(
        o.Sophia(1.0, **SOPHIA),
        0.0,
        [2, -4],
        np.cumsum([-1 / 4, 1.5 / 4]),
        samples=[8, 8],
        linear=2.25 / 4,
        quadratic=2.25 / 4,
    ),
    case(o.Sophia(1.0, debias_momentum=True, **SOPHIA), 0.0, [2, -4], [-0.5, 0.0], samples=[8, 8]),
    case(
        o.Sophia(1.0, debias_hessian=True, **SOPHIA),
        0.0,
        [2, -4],
        np.cumsum([-1 / 8, 1.5 / 8]),
        samples=[8, 8],
        mass=0.5,
    ),
    case(
        o.Sophia(1.0, **SOPHIA, **DEBIASED),
        0.0,
        [2, -4],
        [-0.25, 0.0],
        samples=[8, 8],
        linear=0.5,
        quadratic=0.5,
    ),
    # Without correction h is 1 - .99^40 of its level after 400 steps of k = 10, which is 33%.
    case(o.Sophia(0.0), 0.0, [1] * 400, samples=[1] * 400, h=0.33103, mass=0.33103),
    # k = 2, ρB = 2, λ = .5: θ <- .95 θ - .1 sign(g) min(|g|/(2h), 1); h = 0 at steps 1 and 2.
    # After step 2: h = .5 (4). Step 3: ratio 1/4. Step 4: -6/4 is capped. Then h = .5 (2 + 4), 3/6.
    case(
        o.ReleasedSophiaG(0.1, b1=0.0, b2=0.5, rho=0.5, B=4, weight_decay=0.5, update_interval=2),
        1.0,
        [1e-3, -2, 1, -6, 3],
        [0.85, 0.9075, 0.837125, 0.89526875, 0.8005053125],
        samples=[4, 4, 4, 4, 4],
        h=3,
    ),
    # γ = 1.5, ε = 1, k = 2: m = 1, h = 1, ratio 1/2; m = -3.5, ratio -1.75 -> -1.5.
    case(o.SophiaLite(0.1, **LITE), 0.0, [2, -8], [-0.05, 0.1]),
    # Corrected, ε = 0: 2/2, then m = -3.5/.75 over h = 1/.5.
    case(
        o.SophiaLite(0.1, **(LITE | {"gamma": 9.0, "eps": 0.0}), **DEBIASED),
        0.0,
        [2, -8],
        np.cumsum([-0.1, 0.1 * 3.5 / 0.75 / 2]),
    ),
    # ρ = .5, |g| = 2: h = 4/3, |ratio| = 2/(2/3) = 3. The printed min(·, 1) bounds only +3.
    case(geometric(True), 0.0, [-2, 2], [1, 0]),
    case(geometric(False), 0.0, [-2, 2], [3, 2]),
    # γ = .3, ε = 1, c = .5, k = 2; all averages debiased; ĥ = 8, γĥ = 2.4.
    # 1: m̂ = 2, v̂ = 4, max(2.4, 2) + 1 = 3.4, ratio 2/3.4 > .5.
    # 2: m̂ = -1.5/.75 = -2, v̂ = (1 + 8)/.75 = 12, max(2.4, √12) + 1, ratio -2/(√12 + 1) > -.5.
    case(
        o.MaxForm(0.1, **(SOPHIA | {"gamma": 0.3}), b2v=0.5, eps=1.0, clip_threshold=0.5),
        1.0,
        [2, -4],
        [0.95, 0.95 + 0.2 / (12**0.5 + 1)],
        samples=[8, 99],
        h=4,
        v=9,
    ),
    # The same moments without curvature.
    case(o.Adam(1.0, **HALF, eps=1.0), 0.0, [2, -4], np.cumsum([-2 / 3, 2 / (12**0.5 + 1)])),
    # γ = .25, T = 2, η = .1, ε negligible.
    # 1: m̂ = 2, ŝ = 4, F = (1 + 4/4) 4 = 8, a = 2/8, θ = .975; dt = clip(0, [1, 2]) = 1;
    #    pr = .1 (2/4 - .5 (4)/16) = .0375.
    # 2: m̂ = 2/3, ŝ = 4/3, F = (1 + 1/3) 4/3 = 16/9 > √ŝ, a = 3/8, θ = .9375;
    #    l̂ = (.25 (3) + .5 (2.88))/.75 = 2.92, dt = .04/.0375 = 16/15 within [√.75, 1.5];
    #    pr = .1 (1/4 - .5 (4/3) 9/64) = .015625.
    # 3: m̂ = 18/7, ŝ = 68/7, F = 68/7 + 324/49 = 800/49, a = (18/7)/F = .1575, θ = .92175;
    #    l̂ = (.125 (3) + .25 (2.88) + .5 (2))/.875, l̂ - 2 = .39/.875, bounds [.75, 1.25]: dt = 1.25.
    case(
        o.SOAA(0.1, **SOAA), 1.0, [2, 0], [0.975, 0.9375], losses=[3, 2.88], dt=16 / 15, pr=0.015625
    ),
    case(
        o.SOAA(0.1, **SOAA), 1.0, [2, 0, 4], [0.975, 0.9375, 0.92175], losses=[3, 2.88, 2], dt=1.25
    ),
    # Without losses, λ = .5: θ = 1 - .05 - .025 = .925, then .925 - .04625 - .0375.
    case(o.SOAA(0.1, **SOAA, weight_decay=0.5), 1.0, [2, 0], [0.925, 0.84125], dt=1, pr=0),
    # γ = .25, T = 2, η = .1, ε = 1 (so v0 = 1).
    # 1: dt = 1; v = .5, v̂ = 1, m̂ = 2, ŝ = 4, F = (1 + 4/2) 1 = 3 > 2, a = 2/(3 + 1), θ = .95;
    #    pr = .1 (1 - .5 (1 + .25)) = .0375.
    # 2: ρ̂ = (3 - 2)/1 > .75: dt = 1.5; dv = 4 (.25/.75), v = .25 + 2/3, v̂ = 11/9, m̂ = 2/3,
    #    F = (1 + (4/9)/(20/9)) 11/9 = 22/15, dt F = 2.2 > √(4/3), a = 1/3.2, θ = .95 - .03125;
    #    pr = .1 (5/24 - .5 (25/576 + (11/9)(25/256))).
    # 3: l̂ = 7/3, ρ̂ = 2/15 < .25: dt = .75 (1.5) = 1.125 within [.75, 1.25].
    case(
        o.Tadam(0.1, **TADAM),
        1.0,
        [2, 0],
        [0.95, 0.91875],
        losses=[3, 2],
        dt=1.5,
        pr=0.1 * (5 / 24 - 0.5 * (25 / 576 + 11 / 9 * 25 / 256)),
    ),
    case(o.Tadam(0.1, **TADAM), 1.0, [2, 0, 0], losses=[3, 2, 2.2], dt=1.125),
    # ρ̂ = (3 - 2.5)/1 is between γ and 1 - γ; a first loss has none before it, whatever its sign.
    case(o.Tadam(0.1, **TADAM), 1.0, [2, 0], losses=[3, 2.5], dt=1),
    case(o.Tadam(0.1, **TADAM), 1.0, [2], losses=[-3], dt=1),
    # A region around a sign: a = dt sign(g), linear = dt |g|, quadratic = 0.
    # 1: θ = .9; l̂ = 3, gain 0: dt = 1, the low bound; pr = .1 (2) = .2.
    # 2: θ = 1; l̂ = (.75 + 1.14)/.75 = 2.52, gain .24/.2 = 1.2 within [√.75, 1.5]; pr = .4.
    # 3: no loss: θ = 1 - .12; dt, pr stay.
    # 4: θ = .88 - .12; l̂ = (.945 + 1)/.875, dt = (l̂ - 2)/.4 (1.2) > .75^1.5; pr = .1 (1.2) 5.
    case(
        o.TrustRegion(Sign(), 0.1, **REGION),
        1.0,
        [2, -4, 1, 5],
        [0.9, 1.0, 0.88, 0.76],
        losses=[3, 2.28, np.nan, 2],
        dt=(1.945 / 0.875 - 2) * 3,
        pr=0.6,
    ),
    # By Tadam's rule pr = .1 (linear - .5 linear²).
    # 1: a = 1, θ = .9, linear = 1.5, pr = .0375; the first loss has nothing to be compared with.
    # 2: ρ̂ = .1/.0375 > .75: dt = 1.5 before the step, θ = 1.05, linear = .75, pr = .1 (.46875).
    # 3: no loss: dt stays above the bounds at 3. θ = 1.05 - .15.
    # 4: l̂ = (.75 + 1.45)/.75 = 44/15; ρ̂ of 2.9 is (1/30)/.046875 = .711: factor 1, but dt <= 1.125.
    # 5: a loss above l̂: the factor is the low bound .75².
    case(
        o.TrustRegion(Sign(), 0.1, **REGION, rule="tadam"),
        1.0,
        [1.5, -0.5, 0.5, 0.5, 0.5],
        np.cumsum([0.9, 0.15, -0.15, -0.1125, -0.1125 * 0.75**2]),
        losses=[3, 2.9, np.inf, 2.9, 3.1],
        dt=1.125 * 0.75**2,
    ),
    # A region around Sophia with β1 = β2 = 0, γ = .5, k = 1, c = 1; ε = .5, λ = 1.
    # 1: m = 1, h = 4: a = .5; pr = .1 (.5 - .5 (4)/4) = 0, so the divisor is ε.
    # 2: m = 6, h = 4: 3 -> a = 1; pr = .1 (6 - .5 (4)) = .4; l̂ - l = 1 - l/3 = .6: dt = 1.2.
    # 3: the same gradient: a = 1.2, the radius times c; pr = .1 (7.2 - .5 (4) 1.44).
    case(
        o.TrustRegion(
            o.Sophia(9.0, b1=0.0, b2=0.0, gamma=0.5, update_interval=1),
            0.1,
            **REGION,
            eps=0.5,
            weight_decay=1.0,
        ),
        1.0,
        [1, 6, 6],
        [0.85, 0.665, 0.9 * 0.665 - 0.12],
        samples=[4, 4, 4],
        losses=[3, 1.2, 1],
        pr=0.432,
    ),
]


@pytest.mark.parametrize(("oracle", "run", "path", "last"), BY_HAND)
def test_paths_of_one_number_are_those_by_hand(oracle, run, path, last):
    got = scalar_run(oracle, *run)
    if path is not None:
        close(got, path, rtol=1e-6, atol=1e-12)
    for name, expected in last.items():
        value = getattr(oracle, name)
        close(value["x"] if isinstance(value, dict) else value, expected, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [o.SOAA, o.Tadam])
@pytest.mark.parametrize("missing", [None, np.nan, np.inf])
def test_a_missing_loss_leaves_radius_average_and_prediction_alone(optimizer, missing):
    soaa = optimizer(0.1, total_steps=9, **HALF)
    x = scalar_run(soaa, 1.0, [2, 1], values=[3, 2.5])[-1]
    before = (soaa.dt, soaa.pr, soaa.losses.mass, float(soaa.losses.value[""]))
    scalar_run(soaa, x, [1], values=[missing])
    assert before == (soaa.dt, soaa.pr, soaa.losses.mass, float(soaa.losses.value[""]))
    assert soaa.t == 3 and before[1] > 0


# ---------------------------------------------------------------- whole trees


def test_sophia_rejects_a_sample_with_one_bad_coordinate_whole():
    params = {"a": np.ones(2), "b": np.ones(())}
    sophia = o.Sophia(0.1, update_interval=1, debias_hessian=True)
    bad = {"a": np.array([1.0, np.nan]), "b": np.ones(())}
    for sample, h, rejected in ((bad, 0, 1), (params, 0.01, 1), (bad, 0.01, 2)):
        sophia.step(params, params, sample)
        close(flat(sophia.h), h)
        assert sophia.rejected == rejected and np.isclose(sophia.mass, h)


def test_sophia_refresh_flag_overrides_the_counter():
    sophia, one = o.Sophia(0.1, b2=0.5, update_interval=1), {"x": np.ones(1)}
    for refresh, h in ((False, 0), (True, 0.5)):
        sophia.step(one, one, one, refresh=refresh)
        close(sophia.h["x"], h)
    with pytest.raises(ValueError, match="refresh is due"):
        sophia.step(one, one)


def test_sophia_schedule_mask_and_absent_clip():
    # Step 0 has η = 1, step 1 has η = 2; ratio = g/h = 6/2 = 3 without clip, 1 with.
    params = {"decayed": np.full(2, 10.0), "free": np.full(2, 10.0)}
    grads, hessian = ({name: np.full(2, x) for name in params} for x in (6.0, 2.0))
    options = {"b1": 0.0, "b2": 0.0, "gamma": 1.0, "clip_threshold": None}
    decay = {"weight_decay": 0.1, "decay_names": {"decayed"}}
    sophia = o.Sophia(lambda count: 1.0 + count, **options, **decay)
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


def test_norms_and_sums_are_those_of_the_whole_tree():
    # ‖(3, 0, 4)‖ = 5: samples 9/6, 0, 16/6, halved by β2 = .5; 1.5/.75 and 2/1.333 are clipped.
    grads = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    geometric = o.SophiaGeometric(1.0, b1=0.5, b2=0.5, eps=1e-8)
    params = geometric.step(o.tree(np.zeros_like, grads), grads)
    close(flat(geometric.h), [0.75, 0, 4 / 3])
    close(flat(params), [-1, 0, -1])
    # First step: F = (1 + (3² + 4²)/(3² + 4²)) ŝ = 2 ŝ with one joint sum; √ŝ < F for both.
    grads = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    params = o.SOAA(1.0, total_steps=10).step(o.tree(np.zeros_like, grads), grads)
    close(flat(params), [-3 / 18, -4 / 32], rtol=1e-7)


def test_tadam_second_moment_is_the_exactly_weighted_variance():
    grads, b, eps = np.random.default_rng(7).normal(3, 2, size=(9, 4)), 0.8, 1e-8
    tadam, params = o.Tadam(0.1, total_steps=20, b1=b, b2=b, eps=eps), {"x": np.zeros(4)}
    for t in range(1, 10):
        params = tadam.step(params, {"x": grads[t - 1]})
        w = (1 - b) * b ** np.arange(t - 1, -1, -1)[:, None] / (1 - b**t)
        mean = (w * grads[:t]).sum(0)
        variance = (w * (grads[:t] - mean) ** 2).sum(0)
        close(tadam.v_hat["x"], variance + eps * b**t / (1 - b**t), rtol=1e-10)


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


STILL = {"b1": 0.0, "b2": 0.0}
ONE_SIDED = STILL | {"rho": 0.5, "eps": 0.0, "two_sided": False}


@pytest.mark.parametrize(
    ("rule", "g", "h", "a"),
    [
        # dt = 2, m = 6: Lite 2 (6)/(2 (1) + 1) = 4 -> 2 (1.5).
        (o.SophiaLite(1.0, gamma=1.5, eps=1.0, **STILL), 6.0, 1.0, 3),
        # Geometric, h = 36/7: 12/(36/7), of which the printed min(·, dt) bounds the positive one.
        (o.SophiaGeometric(1.0, **ONE_SIDED), -6.0, 36 / 7, -7 / 3),
        (o.SophiaGeometric(1.0, **ONE_SIDED), 6.0, 36 / 7, 2),
        # Max form, √v̂ = 6 > 2 γ h: 12/(6 + 1).
        (o.MaxForm(1.0, gamma=1.0, eps=1.0, clip_threshold=9.0, **STILL), 6.0, 1.0, 12 / 7),
    ],
)
def test_other_ratios_within_a_radius_by_hand(rule, g, h, a):
    close(rule.direct({"x": np.array(g)}, {"x": np.array(h)}, dt=2.0)["x"], a)
    close((rule.linear, rule.quadratic), (g * a, h * a**2))
