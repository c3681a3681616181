"""Exact models in NumPy float64: likelihoods, Gauss-Newton matrices, differences, the 2-D toy.

Section numbers are those of the algorithm notes. Nothing here is shared with the library.
"""

from dataclasses import dataclass

import numpy as np
from trees import tree, unflatten

# ---------------------------------------------------------------- likelihoods


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


# ---------------------------------------------------------------- exact models


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


# ---------------------------------------------------------------- finite differences


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
