"""Trees in NumPy float64 and their moving averages, from which the oracles are built.

Parameters and gradients are flat dicts `{name: ndarray of any rank}`.
"""

import numpy as np


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


def flat(values):
    """All coordinates of the tree as one vector, leaf after leaf."""
    return np.concatenate([np.ravel(leaf) for leaf in values.values()])


def unflatten(vector, like):
    """Split a flat vector into the leaves of `like`, in its order."""
    ends = np.cumsum([np.size(leaf) for leaf in like.values()])
    parts = np.split(np.asarray(vector), ends[:-1])
    return {n: p.reshape(np.shape(like[n])) for n, p in zip(like, parts, strict=True)}


def random_tree(seed, shapes):
    """Standard normal leaves of these shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


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
