"""NumPy float64 oracles: the estimators and optimizers that tests compare with.

Section numbers are those of the algorithm notes that fix the reading of each paper (1 estimators,
2 Sophia, 3 Sophia-Lite, 4 geometric SophiaG, 5 OrthoSoph, 6 SOAA and Tadam). Nothing here is
shared with the library; exact curvatures are in `exact`. Parameters and gradients are flat dicts
`{name: ndarray of any rank}`; an optimizer holds its state and is driven by

    params = oracle.step(params, grads, hessian=None, refresh=None, value=None)

with `hessian` the raw curvature sample ĥ and `value` the loss of this step. All but SOAA, Tadam and
the released SophiaG also give the direction alone, `direct(grads, hessian, refresh)`, which is what
a `TrustRegion` goes around.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import numpy as np
from oracles_matrix import OrthoSophRows, OrthoSophTiles
from oracles_region import SOAA, Adam, Tadam, TrustRegion
from trees import Average, all_finite, descend, global_norm, rate, total, tree, unflatten

__all__ = [
    "SOAA",
    "Adam",
    "Average",
    "MaxForm",
    "OrthoSophRows",
    "OrthoSophTiles",
    "ReleasedSophiaG",
    "Sophia",
    "SophiaGeometric",
    "SophiaLite",
    "Tadam",
    "TrustRegion",
    "all_finite",
    "descend",
    "gauss_newton_bartlett",
    "global_norm",
    "gradient_magnitude",
    "grouped_gnb",
    "hutchinson",
    "rate",
    "scalar_run",
    "squared_gradient",
    "total",
    "tree",
    "unflatten",
    "weighted_squared_gradient",
]

# ---------------------------------------------------------------- section 1: estimators


def hutchinson(u, Hu):
    """One sample of diag H: u ⊙ (H u)."""
    return tree(np.multiply, u, Hu)


def gauss_newton_bartlett(g, B):
    """One sample of diag GN: B ĝ ⊙ ĝ, ĝ the mean sampled loss's gradient, B outputs counted."""
    return tree(lambda x: B * x * x, g)


def grouped_gnb(s, B):
    """(1/B) Σ_m s_m ⊙ s_m; s_m: the summed sampled gradient of group m, cotangents times √w."""
    return tree(lambda *leaves: sum(x * x for x in leaves) / B, *s)


def squared_gradient(g, B=1.0):
    """Empirical Fisher: g ⊙ g, times B if given."""
    return tree(lambda x: B * x * x, g)


def gradient_magnitude(g):
    """Sample |g| (Sophia-Lite, eq. 2)."""
    return tree(np.abs, g)


def weighted_squared_gradient(g):
    """Sample g² / (1 + ‖g‖), the norm over the whole tree (geometric SophiaG, eq. 1)."""
    norm = global_norm(g)
    return tree(lambda x: x * x / (1 + norm), g)


# ---------------------------------------------------------------- sections 2 to 4: the Sophias


@dataclass
class Sophia:
    """Section 2, Algorithm 3: θ - ηλθ - η clip(m / max(γh, ε), c).

    h is refreshed before the update uses it, at counts 0, k, 2k, ..., unless the caller says
    otherwise through `refresh`. A sample that is not finite everywhere leaves h and its mass alone.

    Within a trust region of radius dt the direction is a = clip(dt m / D(dt h), dt c), where D is
    the denominator max(γh, ε); `linear` = Σ m a and `quadratic` = Σ h a² then predict its gain.
    """

    knows_radius = True

    learning_rate: float | Callable
    _: KW_ONLY
    b1: float = 0.965
    b2: float = 0.99
    gamma: float = 0.01
    eps: float = 1e-12
    weight_decay: float = 0.0
    decay_names: set | None = None
    clip_threshold: float | None = 1.0
    update_interval: int = 10
    debias_momentum: bool = False
    debias_hessian: bool = False

    def __post_init__(self):
        self.momentum, self.curvature = Average(self.b1), Average(self.b2)
        self.count = self.rejected = 0

    m = property(lambda self: self.momentum.value)
    h = property(lambda self: self.curvature.value)
    mass = property(lambda self: self.curvature.mass)

    def observe(self, hessian):
        if hessian is None:
            raise ValueError("a refresh is due and no curvature sample was given")
        if all_finite(hessian):
            self.curvature.add(hessian)
        else:
            self.rejected += 1

    def denominator(self, h):
        return np.maximum(self.gamma * h, self.eps)

    def denominators(self, h):
        return tree(self.denominator, h)

    def clip(self, ratio):
        return np.clip(ratio, -self.bound, self.bound)

    def sample(self, grads, hessian):
        return hessian

    def direct(self, grads, hessian=None, refresh=None, dt=1.0):
        self.curvature.start(grads)
        self.momentum.add(grads)
        if self.count % self.update_interval == 0 if refresh is None else refresh:
            self.observe(self.sample(grads, hessian))
        m = self.momentum.read(self.debias_momentum)
        h = self.curvature.read(self.debias_hessian)
        D = self.denominators(tree(lambda h: dt * h, h))
        self.ratios = tree(lambda m, D: dt * m / D, m, D)
        self.bound = np.inf if self.clip_threshold is None else dt * self.clip_threshold
        self.direction = a = tree(self.clip, self.ratios)
        self.linear = total(tree(np.multiply, m, a))
        self.quadratic = total(tree(lambda h, a: h * a * a, h, a))
        self.count += 1
        return a

    def step(self, params, grads, hessian=None, refresh=None, value=None):
        lr = rate(self.learning_rate, self.count)
        a = self.direct(grads, hessian, refresh)
        return descend(params, a, lr, self.weight_decay, self.decay_names)

    def win_rate(self):
        """Fraction of coordinates of the last step not clipped: |ratio| < its bound, strictly."""
        wins = tree(lambda r: np.abs(r) < self.bound, self.ratios)
        return total(wins) / sum(leaf.size for leaf in wins.values())


@dataclass
class SophiaLite(Sophia):
    """Section 3: θ - ηλθ - η clip(m / (h + ε), γ), h the average of |g|; γ is the clip bound."""

    b1: float = 0.9
    b2: float = 0.95
    gamma: float = 1.0
    eps: float = 1e-8
    update_interval: int = 20

    def __post_init__(self):
        super().__post_init__()
        self.clip_threshold = self.gamma

    def sample(self, grads, hessian):
        return gradient_magnitude(grads) if hessian is None else hessian

    def denominator(self, h):
        return h + self.eps


@dataclass
class SophiaGeometric(Sophia):
    """Section 4: θ - ηλθ - η clip(m / (ρh + ε), 1), h the average of g² / (1 + ‖g‖), every step.

    `two_sided=False` is the printed min(·, 1), which leaves large negative ratios alone.
    """

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    update_interval: int = 1
    rho: float = 1.0
    two_sided: bool = True

    def sample(self, grads, hessian):
        return weighted_squared_gradient(grads) if hessian is None else hessian

    def denominator(self, h):
        return self.rho * h + self.eps

    def clip(self, ratio):
        return super().clip(ratio) if self.two_sided else np.minimum(ratio, self.bound)


@dataclass
class MaxForm(Sophia):
    """The max form: θ - ηλθ - η clip(m̂ / (max(γĥ, √v̂) + ε), c), v the average of g², every step.

    m̂, ĥ and v̂ are debiased, ĥ by its mass. With h = ŝ and γ = F / ŝ it is lines 8 to 10 of SOAA.
    """

    b1: float = 0.9
    eps: float = 1e-8
    debias_momentum: bool = True
    debias_hessian: bool = True
    b2v: float = 0.999

    def __post_init__(self):
        super().__post_init__()
        self.second = Average(self.b2v)

    v = property(lambda self: self.second.value)

    def denominators(self, h):
        v = self.second.read(True)
        return tree(lambda h, v: np.maximum(self.gamma * h, np.sqrt(v)) + self.eps, h, v)

    def direct(self, grads, hessian=None, refresh=None, dt=1.0):
        self.second.add(tree(np.square, grads))
        return super().direct(grads, hessian, refresh, dt)


@dataclass
class ReleasedSophiaG:
    """The released PyTorch SophiaG (section 2): θ(1 - ηλ) - η sign(m) min(|m| / (ρBh + 1e-15), 1).

    h averages ĝ ⊙ ĝ without B and is refreshed after updates k, 2k, ...: `step` folds `hessian`
    (= ĝ ⊙ ĝ) in after the update, or the caller hands it to `refresh` when `refresh_due`, which
    lets ĝ depend on the new parameters and the next batch. No bias correction.
    """

    learning_rate: float | Callable
    _: KW_ONLY
    b1: float = 0.965
    b2: float = 0.99
    rho: float = 0.04
    B: float = 1
    weight_decay: float = 0.1
    update_interval: int = 10

    def __post_init__(self):
        self.momentum, self.curvature, self.count = Average(self.b1), Average(self.b2), 0

    m = property(lambda self: self.momentum.value)
    h = property(lambda self: self.curvature.value)

    @property
    def refresh_due(self):
        return self.count > 0 and self.count % self.update_interval == 0

    def refresh(self, hessian):
        self.curvature.add(hessian)

    def step(self, params, grads, hessian=None, refresh=None, value=None):
        lr = rate(self.learning_rate, self.count)
        self.curvature.start(params)
        self.momentum.add(grads)
        params = tree(lambda p: p * (1 - lr * self.weight_decay), params)
        self.direction = tree(
            lambda m, h: np.sign(m) * np.minimum(np.abs(m) / (self.rho * self.B * h + 1e-15), 1),
            self.m,
            self.h,
        )
        params = tree(lambda p, d: p - lr * d, params, self.direction)
        self.count += 1
        if hessian is not None and (self.refresh_due if refresh is None else refresh):
            self.refresh(hessian)
        return params


# ---------------------------------------------------------------- driving them


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
