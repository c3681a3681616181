"""The oracles of section 6 are right: steps by hand, Adam as a limit, the weighted variance."""

import numpy as np
import oracles as o
import pytest
from oracles import scalar_run
from trees import flat, random_tree

close = np.testing.assert_allclose


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


@pytest.mark.parametrize("optimizer", [o.SOAA, o.Tadam])
@pytest.mark.parametrize("missing", [None, np.nan, np.inf])
def test_a_missing_loss_leaves_radius_average_and_prediction_alone(optimizer, missing):
    soaa = optimizer(0.1, total_steps=9, b1=0.5, b2=0.5)
    x = scalar_run(soaa, 1.0, [2, 1], values=[3, 2.5])[-1]
    before = (soaa.dt, soaa.pr, soaa.losses.mass, float(soaa.losses.value[""]))
    scalar_run(soaa, x, [1], values=[missing])
    assert before == (soaa.dt, soaa.pr, soaa.losses.mass, float(soaa.losses.value[""]))
    assert soaa.t == 3 and before[1] > 0


# ---------------------------------------------------------------- around any direction


class Sign:
    """A direction that knows no radius."""

    def direct(self, grads, hessian=None, refresh=None):
        return o.tree(np.sign, grads)


def test_soaa_rule_around_a_sign_by_hand():
    # β1 = .5, γ = .25, T = 2, η = .1; a = dt sign(g), linear = dt |g|, quadratic = 0.
    # 1: θ = .9; l̂ = 3, gain 0: dt = 1, the low bound; pr = .1 (2) = .2.
    # 2: θ = 1; l̂ = (.75 + 1.14)/.75 = 2.52, gain .24/.2 = 1.2 within [√.75, 1.5]; pr = .4.
    # 3: no loss: θ = 1 - .12; dt, pr stay.
    # 4: θ = .88 - .12; l̂ = (.945 + 1)/.875, dt = (l̂ - 2)/.4 (1.2) > .75^1.5; pr = .1 (1.2) 5.
    region = o.TrustRegion(Sign(), 0.1, total_steps=2, b1=0.5)
    path = scalar_run(region, 1.0, [2, -4], values=[3, 2.28])
    close((region.dt, region.pr), (1.2, 0.4))
    path += scalar_run(region, path[-1], [1], values=[np.nan])
    close((region.dt, region.pr), (1.2, 0.4))
    path += scalar_run(region, path[-1], [5], values=[2])
    close(path, [0.9, 1.0, 0.88, 0.76])
    close((region.dt, region.pr), ((1.945 / 0.875 - 2) * 3, 0.6))


def test_tadam_rule_around_a_sign_by_hand():
    # β1 = .5, γ = .25, T = 2, η = .1; pr = .1 (linear - .5 linear²).
    # 1: a = 1, θ = .9, linear = 1.5, pr = .0375; the first loss has nothing to be compared with.
    # 2: ρ̂ = .1/.0375 > .75: dt = 1.5 before the step, θ = 1.05, linear = .75, pr = .1 (.46875).
    # 3: no loss: dt stays above the bounds at 3. θ = 1.05 - .15.
    # 4: l̂ = (.75 + 1.45)/.75 = 44/15; ρ̂ of 2.9 is (1/30)/.046875 = .711: factor 1, but dt <= 1.125.
    # 5: a loss above l̂: the factor is the low bound .75².
    region = o.TrustRegion(Sign(), 0.1, total_steps=2, b1=0.5, rule="tadam")
    path = scalar_run(region, 1.0, [1.5], values=[3])
    close((region.dt, region.pr), (1, 0.0375))
    path += scalar_run(region, path[-1], [-0.5], values=[2.9])
    close((region.dt, region.pr), (1.5, 0.046875))
    path += scalar_run(region, path[-1], [0.5], values=[np.inf])
    close((region.dt, region.pr), (1.5, 0.046875))
    path += scalar_run(region, path[-1], [0.5], values=[2.9])
    close(region.dt, 1.125)
    path += scalar_run(region, path[-1], [0.5], values=[3.1])
    close(region.dt, 1.125 * 0.75**2)
    close(path, np.cumsum([0.9, 0.15, -0.15, -0.1125, -0.1 * region.dt]))


def test_soaa_rule_around_sophia_by_hand():
    # β1 = β2 = 0, γ = .5, k = 1, c = 1; region β1 = .5, γ = .25, T = 2, η = .1.
    # 1: m = 1, h = 4: a = .5; pr = .1 (.5 - .5 (4)/4) = 0, so the divisor is its ε = .5.
    # 2: m = 6, h = 4: 3 -> a = 1; pr = .1 (6 - .5 (4)) = .4; l̂ - l = 1 - l/3 = .6: dt = 1.2.
    # 3: the same gradient: a = 1.2, the radius times c; pr = .1 (7.2 - .5 (4) 1.44).
    sophia = o.Sophia(9.0, b1=0.0, b2=0.0, gamma=0.5, update_interval=1)
    region = o.TrustRegion(sophia, 0.1, total_steps=2, b1=0.5, eps=0.5, weight_decay=1.0)
    path = scalar_run(region, 1.0, [1, 6], [4, 4], [3, 1.2])
    close(path, [0.85, 0.665])
    close((region.dt, region.pr), (1.2, 0.4))
    close(scalar_run(region, 0.665, [6], [4], [1]), [0.9 * 0.665 - 0.12])
    close(region.pr, 0.432)


T = 14
SCALES = {"a": np.array([3.0, 1e-3, 0.2]), "b": np.array([[1.0, 30.0], [1e-2, 0.5]])}


def losses_and_gradients():
    """Losses (two of them missing) near what a region predicts, and gradients of all scales."""
    rng = np.random.default_rng(32)
    grads = [o.tree(lambda s: s * (rng.normal(size=s.shape) + 0.5), SCALES) for _ in range(T)]
    values = list(4 - 0.02 * np.arange(T) + 0.02 * rng.normal(size=T))
    values[4], values[9] = None, np.nan
    return values, grads


def weighted_mean(b, history):
    """The debiased average of the rows with decay b, in closed form."""
    t = len(history)
    return b ** np.arange(t - 1, -1, -1) @ history * (1 - b) / (1 - b**t)


def agree(soaa, rule, curvature, **options):
    """`soaa` is the region around the max form with γ ĥ = F; returns the radii and who won."""
    values, grads = losses_and_gradients()
    form = o.MaxForm(9.0, b1=soaa.b1, b2=0.0, b2v=soaa.b2, clip_threshold=None, update_interval=1)
    form.eps = soaa.eps
    region = o.TrustRegion(
        form, soaa.learning_rate, total_steps=T, b1=soaa.b1, rule=rule, **options
    )
    ours = theirs = random_tree(33, {name: s.shape for name, s in SCALES.items()})
    radii, won = [], []
    for t, (g, value) in enumerate(zip(grads, values, strict=True), 1):
        history = np.stack([flat(g) for g in grads[:t]])
        v, form.gamma = curvature(history)
        theirs = soaa.step(theirs, g, value=value)
        ours = region.step(ours, g, o.unflatten(v, SCALES), value=value)
        close(flat(ours), flat(theirs), rtol=1e-10)
        close((region.dt, region.pr), (soaa.dt, soaa.pr), rtol=1e-8)
        radii.append(region.dt)
        won.append(region.dt * form.gamma * v > np.sqrt(weighted_mean(soaa.b2, history**2)))
    return radii, np.mean(won)


def test_soaa_is_the_soaa_rule_around_the_max_form_of_adams_moments():
    def curvature(history):
        m, s = weighted_mean(0.9, history), weighted_mean(0.99, history**2)
        return s, 1 + (m**2).sum() / (s + 1e-8).sum()

    soaa = o.SOAA(lambda count: 0.01 / (1 + count), total_steps=T, b2=0.99, weight_decay=0.1)
    radii, won = agree(soaa, "soaa", curvature, weight_decay=0.1)
    assert len({round(r, 9) for r in radii}) > 5 and 0.2 < won < 0.8


def test_tadam_is_the_tadam_rule_around_the_max_form_of_a_centred_moment():
    # β1 = β2 = .8: the centred moment is the exactly weighted variance, v0 = ε aside.
    def curvature(history):
        m, t = weighted_mean(0.8, history), len(history)
        v = weighted_mean(0.8, (history - m) ** 2) + 1e-4 * 0.8**t / (1 - 0.8**t)
        return v, 1 + (m**2 / (v + 1e-4)).sum()

    tadam = o.Tadam(lambda count: 0.01 / (1 + count), total_steps=T, b1=0.8, b2=0.8, eps=1e-4)
    radii, won = agree(tadam, "tadam", curvature, eps=1e-4)
    assert len({round(r, 9) for r in radii}) > 5 and 0.2 < won < 0.8


@pytest.mark.parametrize(
    "make",
    [
        o.Sophia,
        o.SophiaLite,
        o.SophiaGeometric,
        o.MaxForm,
        o.Adam,
        lambda lr, **options: o.OrthoSophTiles(lr, b=2, **options),
        lambda lr, **options: o.OrthoSophRows(lr, block_size=2, rms=0.2, **options),
    ],
    ids=["sophia", "lite", "geometric", "max form", "adam", "tiles", "rows"],
)
@pytest.mark.parametrize("rule", ["soaa", "tadam"])
def test_a_region_without_losses_is_the_optimizer_alone(make, rule):
    decay = {"weight_decay": 0.1, "decay_names": {"b"}}
    alone, region = (make(0.05, **decay), o.TrustRegion(make(0.0), 0.05, total_steps=T, **decay))
    region.rule = rule
    ours = theirs = random_tree(34, {name: s.shape for name, s in SCALES.items()})
    for t, g in enumerate(losses_and_gradients()[1][:4]):
        hessian, refresh = o.tree(np.square, g), None if t < 2 else t == 3
        theirs = alone.step(theirs, g, hessian, refresh)
        ours = region.step(ours, g, hessian, refresh)
        close(flat(ours), flat(theirs), rtol=1e-14)


def test_adam_is_the_quotient_of_debiased_averages():
    _, grads = losses_and_gradients()
    adam = o.Adam(1.0, b1=0.7, b2=0.9, eps=1e-3)
    for t in range(1, T + 1):
        history = np.stack([flat(g) for g in grads[:t]])
        m, v = weighted_mean(0.7, history), weighted_mean(0.9, history**2)
        close(flat(adam.direct(grads[t - 1])), m / (np.sqrt(v) + 1e-3), rtol=1e-12)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="no rule"):
        o.TrustRegion(Sign(), 0.1, total_steps=2, rule="taddam")
