"""NumPy float64 oracles: the optimizers, estimators and exact curvatures that tests compare with.

Section numbers are those of the algorithm notes that fix the reading of each paper (1 estimators,
2 Sophia, 3 Sophia-Lite, 4 geometric SophiaG, 5 OrthoSoph, 6 SOAA and Tadam). Nothing here is
shared with the library. Parameters and gradients are flat dicts `{name: ndarray of any rank}`;
an optimizer holds its state and is driven by

    params = oracle.step(params, grads, hessian=None, refresh=None, value=None)

with `hessian` the raw curvature sample ĥ and `value` the loss of this step.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import numpy as np

# ---------------------------------------------------------------- trees and averages


def tree(function, *trees):
    """Apply `function` leaf by leaf."""
    return {name: function(*(np.asarray(t[name], np.float64) for t in trees)) for name in trees[0]}


def total(values):
    """Σ over every coordinate of the whole tree."""
    return float(sum(np.sum(leaf) for leaf in values.values()))


def global_norm(values):
    """‖·‖ over the whole tree."""
    return np.sqrt(total(tree(np.square, values)))


def all_finite(values):
    """Whether no coordinate of the whole tree is infinite or NaN."""
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in values.values())


class Average:
    """Exponential moving average that starts at 0, with the total weight `mass` of its samples."""

    def __init__(self, decay):
        self.decay, self.value, self.mass = decay, None, 0.0

    def start(self, like):
        if self.value is None:
            self.value = tree(np.zeros_like, like)

    def add(self, sample):
        self.start(sample)
        self.value = tree(lambda a, x: self.decay * a + (1 - self.decay) * x, self.value, sample)
        self.mass = self.decay * self.mass + (1 - self.decay)

    def read(self, debias):
        """The average, divided by its mass when `debias` (0 while nothing has been added)."""
        scale = 1 / self.mass if debias and self.mass > 0 else 1.0
        return tree(lambda a: scale * a, self.value)


def rate(learning_rate, count):
    """A constant, or a function of the 0-based step."""
    return learning_rate(count) if callable(learning_rate) else learning_rate


def descend(params, direction, lr, weight_decay=0.0, decay_names=None):
    """θ - ηλθ - η·direction; λ only for `decay_names` (None: for all). Decoupled, not clipped."""
    decayed = set(params) if decay_names is None else set(decay_names)
    return {
        name: leaf - lr * (weight_decay if name in decayed else 0.0) * leaf - lr * direction[name]
        for name, leaf in tree(np.array, params).items()
    }


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
    """

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

    def ratio(self, m, h):
        return m / np.maximum(self.gamma * h, self.eps)

    def clip(self, ratio):
        c = self.clip_threshold
        return ratio if c is None else np.clip(ratio, -c, c)

    def sample(self, grads, hessian):
        return hessian

    def step(self, params, grads, hessian=None, refresh=None, value=None):
        self.curvature.start(params)
        self.momentum.add(grads)
        if self.count % self.update_interval == 0 if refresh is None else refresh:
            self.observe(self.sample(grads, hessian))
        m = self.momentum.read(self.debias_momentum)
        h = self.curvature.read(self.debias_hessian)
        self.ratios = tree(self.ratio, m, h)
        self.direction = tree(self.clip, self.ratios)
        lr = rate(self.learning_rate, self.count)
        self.count += 1
        return descend(params, self.direction, lr, self.weight_decay, self.decay_names)

    def win_rate(self):
        """Fraction of coordinates of the last step that were not clipped: |ratio| < c, strictly."""
        c = np.inf if self.clip_threshold is None else self.clip_threshold
        wins = tree(lambda r: np.abs(r) < c, self.ratios)
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

    def ratio(self, m, h):
        return m / (h + self.eps)


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

    def ratio(self, m, h):
        return m / (self.rho * h + self.eps)

    def clip(self, ratio):
        return super().clip(ratio) if self.two_sided else np.minimum(ratio, self.clip_threshold)


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


# ---------------------------------------------------------------- section 5: OrthoSoph


def to_tiles(matrix, b):
    """[..., n, m] -> [..., ⌈n/b⌉, ⌈m/b⌉, b, b], ragged edges filled with zeros."""
    *batch, n, m = matrix.shape
    rows, columns = -(-n // b), -(-m // b)
    padded = np.zeros((*batch, rows * b, columns * b))
    padded[..., :n, :m] = matrix
    return padded.reshape(*batch, rows, b, columns, b).swapaxes(-3, -2)


def from_tiles(tiles, n, m):
    """Inverse of `to_tiles`."""
    *batch, rows, columns, b, _ = tiles.shape
    return tiles.swapaxes(-3, -2).reshape(*batch, rows * b, columns * b)[..., :n, :m]


def inverse_square_root(C, eps):
    """(C + εI)^(-1/2) of symmetric positive semidefinite C, by eigenvectors."""
    values, vectors = np.linalg.eigh(C)
    # eigh returns the null space of C as about ±1e-16, which ε may not outweigh.
    scale = 1 / np.sqrt(np.maximum(values, 0) + eps)
    return (vectors * scale[..., None, :]) @ vectors.swapaxes(-1, -2)


@dataclass
class OrthoSophTiles:
    """Section 5, the faithful reading: per tile C <- β2 C + (1-β2) G Gᵀ, step (C + εI)^(-1/2) M.

    M = β1 M + (1-β1) G: no momentum rule is stated, and this is the EMA used everywhere else.
    Rank 0 and 1, and the leaves in `diagonal_names`, use tiles of one number; leaves of rank 3 and
    more are batches of matrices over their last two axes. No bias correction; no clip.
    """

    learning_rate: float | Callable
    _: KW_ONLY
    b: int
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_names: set | None = None
    diagonal_names: tuple = ()

    def __post_init__(self):
        self.momentum, self.curvature, self.count = Average(self.b1), Average(self.b2), 0

    m = property(lambda self: self.momentum.value)
    h = property(lambda self: self.curvature.value)

    def is_diagonal(self, name, leaf):
        return leaf.ndim < 2 or name in self.diagonal_names

    def outer(self, name, g):
        if self.is_diagonal(name, g):
            return g * g
        tiles = to_tiles(g, self.b)
        return tiles @ tiles.swapaxes(-1, -2)

    def precondition(self, name, m, C):
        if self.is_diagonal(name, m):
            return m / np.sqrt(C + self.eps)
        tiles = inverse_square_root(C, self.eps) @ to_tiles(m, self.b)
        return from_tiles(tiles, *m.shape[-2:])

    def step(self, params, grads, hessian=None, refresh=None, value=None):
        grads = tree(np.array, grads)
        self.momentum.add(grads)
        self.curvature.add({name: self.outer(name, g) for name, g in grads.items()})
        self.direction = {n: self.precondition(n, m, self.h[n]) for n, m in self.m.items()}
        lr = rate(self.learning_rate, self.count)
        self.count += 1
        return descend(params, self.direction, lr, self.weight_decay, self.decay_names)


# ---------------------------------------------------------------- section 6: SOAA and Tadam


@dataclass
class SOAA:
    """Section 6, Algorithm 1 as printed, lines 5 to 19, with v̂ read as ŝ.

    Lines 16 to 19 are skipped when `value` is None: dt keeps its value. l̂ is corrected by the mass
    of the losses seen, which is the printed 1 - β1^t when every step brings one.
    """

    learning_rate: float | Callable
    _: KW_ONLY
    total_steps: int
    b1: float = 0.9
    b2: float = 0.999
    gamma: float = 0.25
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_names: set | None = None

    def __post_init__(self):
        self.momentum, self.second, self.losses = (Average(b) for b in (self.b1, self.b2, self.b1))
        self.dt, self.pr, self.t = 1.0, 0.0, 0

    m = property(lambda self: self.momentum.value)
    s = property(lambda self: self.second.value)

    def bounds(self):
        power = (self.t - 1) / self.total_steps
        return (1 - self.gamma) ** power, 1 + self.gamma**power

    def moments(self, grads):
        """m̂ and ŝ of lines 5 to 7."""
        self.momentum.add(grads)
        self.second.add(tree(np.square, grads))
        return self.momentum.read(True), self.second.read(True)

    def mean_loss(self, value):
        self.losses.add({"": np.float64(value)})
        return float(self.losses.read(True)[""])

    def direction_from(self, m, s, F):
        """Lines 9 and 10."""
        scale = tree(lambda f, s: np.maximum(self.dt * f, np.sqrt(s)), F, s)
        return tree(lambda m, scale: m * self.dt / (scale + self.eps), m, scale)

    def step(self, params, grads, hessian=None, refresh=None, value=None):
        lr = rate(self.learning_rate, self.t)
        self.t += 1
        m, s = self.moments(grads)
        factor = 1 + total(tree(np.square, m)) / total(tree(lambda s: s + self.eps, s))
        a = self.direction = self.direction_from(m, s, tree(lambda s: factor * s, s))
        if value is not None:
            gain = self.mean_loss(value) - value
            self.dt = float(np.clip(gain / max(self.pr, self.eps) * self.dt, *self.bounds()))
            self.pr = lr * total(tree(lambda m, s, a: m * a - 0.5 * s * a * a, m, s, a))
        return descend(params, a, lr, self.weight_decay, self.decay_names)


class Tadam(SOAA):
    """Section 6, the improved rule: dt first, a centred second moment, F by a sum of ratios.

    As in the published code, (β2 - β2^t) / (1 - β2^t) multiplies the increment (g - m̂_{t-1})² and
    v̂ = v / (1 - β2^t): for β1 = β2 the increment is then (g - m̂_{t-1})(g - m̂_t), and v̂ the exactly
    weighted variance. (Multiplying v by the factor instead would leave v uncorrected.) Line 9 keeps
    sqrt(ŝ), uncentred. The first loss has no l̂ before it and leaves dt = 1.
    """

    v = m_hat = None

    def region(self, value):
        """Set dt <- factor dt, clipped to the bounds at t, from l̂ up to t-1 and the last pr."""
        if self.losses.mass == 0:
            return
        low, high = self.bounds()
        rho = (float(self.losses.read(True)[""]) - value) / max(self.pr, self.eps)
        factor = low if rho < self.gamma else high if rho > 1 - self.gamma else 1.0
        self.dt = float(np.clip(factor * self.dt, low, high))

    def centred(self, grads):
        """v̂ from g and the m̂ of the step before; v starts at ε."""
        if self.v is None:
            self.v = tree(lambda g: np.full_like(g, self.eps), grads)
            self.m_hat = tree(np.zeros_like, grads)
        mass = 1 - self.b2**self.t
        weight = (1 - self.b2) * (self.b2 - self.b2**self.t) / mass
        self.v = tree(
            lambda v, g, m: self.b2 * v + weight * (g - m) ** 2, self.v, grads, self.m_hat
        )
        return tree(lambda v: v / mass, self.v)

    def step(self, params, grads, hessian=None, refresh=None, value=None):
        lr = rate(self.learning_rate, self.t)
        self.t += 1
        if value is not None:
            self.region(value)
            self.mean_loss(value)
        v = self.v_hat = self.centred(grads)
        m, s = self.moments(grads)
        self.m_hat = m
        factor = 1 + total(tree(lambda m, v: m * m / (v + self.eps), m, v))
        a = self.direction = self.direction_from(m, s, tree(lambda v: factor * v, v))
        if value is not None:
            slope = total(tree(np.multiply, m, a))
            curvature = slope**2 + total(tree(lambda v, a: v * a * a, v, a))
            self.pr = lr * (slope - 0.5 * curvature)
        return descend(params, a, lr, self.weight_decay, self.decay_names)


# ---------------------------------------------------------------- exact models


def softmax(f):
    e = np.exp(f - f.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(f):
    return 0.5 * (1 + np.tanh(0.5 * f))


def output_losses(likelihood, f, y):
    """-log p(y | f) up to a constant, in the shape of what B counts (section 1)."""
    if likelihood == "categorical":
        top = f.max(-1)
        log_partition = top + np.log(np.exp(f - top[..., None]).sum(-1))
        return log_partition - np.take_along_axis(f, np.asarray(y)[..., None], -1)[..., 0]
    if likelihood == "bernoulli":
        return np.logaddexp(0, f) - y * f
    return 0.5 * ((y - f) ** 2).sum(-1)


def output_gradient(likelihood, f, y):
    """∂ loss / ∂ f, in the shape of f."""
    if likelihood == "categorical":
        return softmax(f) - np.eye(f.shape[-1])[np.asarray(y)]
    return (sigmoid(f) if likelihood == "bernoulli" else f) - y


def output_hessian(likelihood, f):
    """∂² loss / ∂f ∂f, [..., V, V]; no label enters it."""
    eye = np.eye(f.shape[-1])
    if likelihood == "categorical":
        p = softmax(f)
        return p[..., None] * eye - p[..., None] * p[..., None, :]
    if likelihood == "bernoulli":
        p = sigmoid(f)
        return (p * (1 - p))[..., None] * eye
    return np.broadcast_to(eye, (*f.shape, f.shape[-1]))


@dataclass
class ExactModel:
    """Weighted mean loss (1/Σw) Σ w ℓ(f(X; θ), y) and its Gauss-Newton matrix in closed form.

    `weights` has the shape of what B counts: X's leading axes, and V too for Bernoulli. A model
    gives `outputs(params)`, f of shape [..., V], and `jacobian(params)`, {name: [..., V, *leaf]}.
    """

    likelihood: str
    X: np.ndarray  # [..., d]
    weights: np.ndarray | None = None

    def weighted(self, f):
        """(w as counted, w as a factor of f); w = 1 by default."""
        counted = f.shape if self.likelihood == "bernoulli" else f.shape[:-1]
        w = np.ones(counted) if self.weights is None else np.asarray(self.weights, np.float64)
        if w.shape != counted:
            raise ValueError(f"weights have shape {w.shape}, the counted outputs {counted}")
        return w, w if self.likelihood == "bernoulli" else w[..., None]

    def loss(self, params, y):
        f = self.outputs(params)
        w, _ = self.weighted(f)
        return float((w * output_losses(self.likelihood, f, y)).sum() / w.sum())

    def summed_sample(self, params, y, power=0.5):
        """Gradient of the loss on y summed over outputs, cotangents times w^power (√w: s_m)."""
        f = self.outputs(params)
        _, w = self.weighted(f)
        cotangent = w**power * output_gradient(self.likelihood, f, y)
        return tree(lambda j: np.tensordot(cotangent, j, axes=f.ndim), self.jacobian(params))

    def gradient(self, params, y):
        w, _ = self.weighted(self.outputs(params))
        return tree(lambda s: s / w.sum(), self.summed_sample(params, y, power=1))

    def gauss_newton(self, params):
        """(1/Σw) Σ w Jᵀ H_f J, [P, P], leaves flattened and joined in the order of `params`."""
        f, jacobian = self.outputs(params), self.jacobian(params)
        w, factor = self.weighted(f)
        V = f.shape[-1]
        J = np.concatenate([jacobian[name].reshape(f.size // V, V, -1) for name in params], -1)
        # Scaling row v by w_v is right: H_f is diagonal where the V outputs are weighted apart.
        H = (factor[..., None] * output_hessian(self.likelihood, f)).reshape(-1, V, V)
        return np.einsum("nvp,nvu,nuq->pq", J, H, J) / w.sum()

    def gauss_newton_diagonal(self, params):
        return unflatten(np.diag(self.gauss_newton(params)), params)


class ExactLinear(ExactModel):
    """f = X W, params {"W": [d, V]}: Gauss-Newton is the Hessian, whatever the labels."""

    hessian = ExactModel.gauss_newton
    hessian_diagonal = ExactModel.gauss_newton_diagonal

    def outputs(self, params):
        return self.X @ params["W"]

    def jacobian(self, params):
        """∂f_v/∂W_iu = x_i δ_uv."""
        return {"W": np.einsum("...i,vu->...viu", self.X, np.eye(params["W"].shape[1]))}


class ExactTanh(ExactModel):
    """f = tanh(X w1 + b1) w2 + b2, params {"w1": [d, k], "b1": [k], "w2": [k, V], "b2": [V]}."""

    def hidden(self, params):
        return np.tanh(self.X @ params["w1"] + params["b1"])

    def outputs(self, params):
        return self.hidden(params) @ params["w2"] + params["b2"]

    def jacobian(self, params):
        """With a = tanh(z): a_j δ_uv (w2), δ_uv (b2), (1-a_j²) w2_jv (b1), x_i times that (w1)."""
        a, eye = self.hidden(params), np.eye(params["w2"].shape[1])
        slope = np.einsum("...j,jv->...vj", 1 - a * a, params["w2"])
        return {
            "w1": np.einsum("...i,...vj->...vij", self.X, slope),
            "b1": slope,
            "w2": np.einsum("...j,vu->...vju", a, eye),
            "b2": np.broadcast_to(eye, (*a.shape[:-1], *eye.shape)),
        }


def unflatten(vector, like):
    """Split a flat vector into the leaves of `like`, in its order."""
    ends = np.cumsum([np.size(leaf) for leaf in like.values()])
    parts = np.split(np.asarray(vector), ends[:-1])
    return {n: p.reshape(np.shape(like[n])) for n, p in zip(like, parts, strict=True)}


def central_difference(function, params, step=1e-5):
    """[P, *shape of function's value]: its derivative by each coordinate, flattened as above."""
    base = np.concatenate([np.ravel(leaf) for leaf in params.values()]).astype(np.float64)
    rows = []
    for shift in step * np.eye(base.size):
        up, down = (function(unflatten(base + sign * shift, params)) for sign in (1, -1))
        rows.append((np.asarray(up) - np.asarray(down)) / (2 * step))
    return np.stack(rows)


# ---------------------------------------------------------------- section 2: the 2-D toy

TOY_MINIMUM = (1.0, 4.0)
TOY_SADDLE = (0.0, 4.0)
# The notes do not name it: L is about 5.43 here, so only (1, 4) is the global minimum.
TOY_LOCAL_MINIMUM = (-17 / 26, 4.0)


def toy_loss(theta):
    """8(θ1-1)²(1.3 θ1² + 2 θ1 + 1) + ½(θ2-4)²."""
    x, y = theta
    return 8 * (x - 1) ** 2 * (1.3 * x * x + 2 * x + 1) + 0.5 * (y - 4) ** 2


def toy_gradient(theta):
    """(8 θ1 (θ1-1)(5.2 θ1 + 3.4), θ2 - 4)."""
    x, y = theta
    return np.array([8 * x * (x - 1) * (5.2 * x + 3.4), y - 4])


def toy_hessian(theta):
    """diag(8(15.6 θ1² - 3.6 θ1 - 3.4), 1)."""
    x, _ = theta
    return np.diag([8 * (15.6 * x * x - 3.6 * x - 3.4), 1.0])
