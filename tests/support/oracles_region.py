"""Section 6's oracles in NumPy float64: SOAA, Tadam and the trust region around any direction."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import numpy as np
from trees import Average, descend, rate, total, tree


def is_loss(value):
    """Whether the trust region can learn from this value."""
    return value is not None and bool(np.isfinite(value))


@dataclass
class SOAA:
    """Section 6, Algorithm 1 as printed, lines 5 to 19, with v̂ read as ŝ.

    Lines 16 to 19 are skipped when `value` is None or not finite: dt keeps its value. l̂ is
    corrected by the mass of the losses seen, the printed 1 - β1^t when every step brings one.
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
        if is_loss(value):
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
        if is_loss(value):
            self.region(value)
            self.mean_loss(value)
        v = self.v_hat = self.centred(grads)
        m, s = self.moments(grads)
        self.m_hat = m
        factor = 1 + total(tree(lambda m, v: m * m / (v + self.eps), m, v))
        a = self.direction = self.direction_from(m, s, tree(lambda v: factor * v, v))
        if is_loss(value):
            slope = total(tree(np.multiply, m, a))
            curvature = slope**2 + total(tree(lambda v, a: v * a * a, v, a))
            self.pr = lr * (slope - 0.5 * curvature)
        return descend(params, a, lr, self.weight_decay, self.decay_names)


# ---------------------------------------------------------------- around any direction


@dataclass
class Adam:
    """θ - ηλθ - η m̂ / (√v̂ + ε), a direction that knows no radius."""

    learning_rate: float | Callable
    _: KW_ONLY
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_names: set | None = None

    def __post_init__(self):
        self.momentum, self.second, self.count = Average(self.b1), Average(self.b2), 0

    def direct(self, grads, hessian=None, refresh=None):
        self.momentum.add(grads)
        self.second.add(tree(np.square, grads))
        self.count += 1
        m, v = self.momentum.read(True), self.second.read(True)
        return tree(lambda m, v: m / (np.sqrt(v) + self.eps), m, v)

    def step(self, params, grads, hessian=None, refresh=None, value=None):
        lr = rate(self.learning_rate, self.count)
        direction = self.direct(grads)
        return descend(params, direction, lr, self.weight_decay, self.decay_names)


@dataclass
class TrustRegion:
    """Section 6's radius dt around any direction: θ - ηλθ - ηa.

    `direction_rule` is an oracle of which only `direct` is used. One that knows the radius puts dt
    inside and gives `linear` and `quadratic` itself; of any other direction d, a = dt d,
    linear = Σ g a and quadratic = 0.
    Rule "soaa": lines 16 to 19 after the step, pr = η (linear - ½ quadratic).
    Rule "tadam": dt first, by the factor of ρ̂; pr = η (linear - ½ (linear² + quadratic)).
    A `value` that is None or not finite leaves dt, l̄ and pr alone; t goes on.
    """

    direction_rule: object
    learning_rate: float | Callable
    _: KW_ONLY
    total_steps: int
    rule: str = "soaa"
    b1: float = 0.9
    gamma: float = 0.25
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_names: set | None = None

    def __post_init__(self):
        if self.rule not in ("soaa", "tadam"):
            raise ValueError(f"no rule {self.rule!r}")
        self.dt, self.pr, self.l_bar, self.mass, self.t = 1.0, 0.0, 0.0, 0.0, 0

    def see(self, value):
        """Lines 16 and 17; returns l̂, value included."""
        self.l_bar = self.b1 * self.l_bar + (1 - self.b1) * value
        self.mass = self.b1 * self.mass + (1 - self.b1)
        return self.l_bar / self.mass

    def scale_radius(self, factor):
        """Line 18: dt <- factor dt within the bounds at t."""
        power = (self.t - 1) / self.total_steps
        low, high = (1 - self.gamma) ** power, 1 + self.gamma**power
        self.dt = min(max(factor * self.dt, low), high)

    def tadam_factor(self, value):
        power = (self.t - 1) / self.total_steps
        rho = (self.l_bar / self.mass - value) / max(self.pr, self.eps)
        if rho < self.gamma:
            return (1 - self.gamma) ** power
        return 1 + self.gamma**power if rho > 1 - self.gamma else 1.0

    def proposal(self, grads, hessian, refresh):
        """(a, linear, quadratic)."""
        rule = self.direction_rule
        if getattr(rule, "knows_radius", False):
            a = rule.direct(grads, hessian, refresh, dt=self.dt)
            return a, rule.linear, rule.quadratic
        a = tree(lambda d: self.dt * d, rule.direct(grads, hessian, refresh))
        return a, total(tree(np.multiply, grads, a)), 0.0

    def step(self, params, grads, hessian=None, refresh=None, value=None):
        lr = rate(self.learning_rate, self.t)
        self.t += 1
        seen, tadam = is_loss(value), self.rule == "tadam"
        if tadam and seen:
            if self.mass > 0:  # the first loss has no l̂ before it
                self.scale_radius(self.tadam_factor(value))
            self.see(value)
        a, linear, quadratic = self.proposal(grads, hessian, refresh)
        if seen:
            if not tadam:
                self.scale_radius((self.see(value) - value) / max(self.pr, self.eps))
            self.pr = lr * (linear - 0.5 * (quadratic + (linear**2 if tadam else 0.0)))
        self.direction = a
        return descend(params, a, lr, self.weight_decay, self.decay_names)
