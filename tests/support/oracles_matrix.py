"""Section 5's oracle in NumPy float64: OrthoSoph by tiles (faithful) and by rows (recommended)."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import numpy as np
from trees import Average, descend, rate, tree


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


def widened(matrix):
    """Transposed where it has more rows than columns."""
    return matrix.swapaxes(-1, -2) if matrix.shape[-2] > matrix.shape[-1] else matrix


@dataclass
class OrthoSophTiles:
    """Section 5, the faithful reading: per tile C <- β2 C + (1-β2) G Gᵀ, step (C + εI)^(-1/2) M.

    M = β1 M + (1-β1) G: no momentum rule is stated, and this is the EMA used everywhere else;
    `nesterov` steps by β1 M + (1-β1) G once more.
    Rank 0 and 1, and the leaves in `diagonal_names`, use tiles of one number; leaves of rank 3 and
    more are batches of matrices over their last two axes. No bias correction; no clip.
    """

    learning_rate: float | Callable
    _: KW_ONLY
    b: int
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    nesterov: bool = False
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

    def direct(self, grads, hessian=None, refresh=None):
        grads = tree(np.array, grads)
        self.momentum.add(grads)
        self.curvature.add({name: self.outer(name, g) for name, g in grads.items()})
        ahead = self.b1 if self.nesterov else 1.0
        N = tree(lambda m, g: ahead * m + (1 - ahead) * g, self.m, grads)
        self.direction = {name: self.precondition(name, n, self.h[name]) for name, n in N.items()}
        self.count += 1
        return self.direction

    def step(self, params, grads, hessian=None, refresh=None, value=None):
        lr = rate(self.learning_rate, self.count)
        direction = self.direct(grads)
        return descend(params, direction, lr, self.weight_decay, self.decay_names)


@dataclass
class OrthoSophRows:
    """Section 5, rows: per group of rows n of N, C <- β2 C + (1-β2) n nᵀ / m, step R n.

    M <- β1 M + (1-β1) G; N = M̂, or with `nesterov` β1 M / (1-β1^(t+1)) + (1-β1) G / (1-β1^t).
    Rows are the shorter side [n, m], transposed if need be, in groups of min(`block_size`, n), the
    last one smaller. R = Z / √‖Ĉ‖_F with Z = (Ĉ/‖Ĉ‖_F + ε I)^(-1/2) refreshed at counts 0, k, 2k,
    ... or as `refresh` says: between refreshes its shape is old, its scale is not. `rms` rescales
    the whole matrix's direction to that root mean square. Rank 0 and 1, and `diagonal_names`, take
    Adam's direction without ε, n̂ / √v̂, where β2 is `b2_vector`; rank 3 and more are batches of
    matrices. `h` and `Z` are keyed by (name, index in the batch, first row), `h` by the name where
    it is diagonal.
    """

    learning_rate: float | Callable
    _: KW_ONLY
    block_size: int
    b1: float = 0.95
    b2: float = 0.0
    b2_vector: float = 0.95
    eps: float = 1e-6
    update_interval: int = 1
    rms: float | None = None
    nesterov: bool = True
    weight_decay: float = 0.0
    decay_names: set | None = None
    diagonal_names: tuple = ()

    def __post_init__(self):
        self.momentum, self.blocks, self.numbers = map(Average, (self.b1, self.b2, self.b2_vector))
        self.count = 0

    m = property(lambda self: self.momentum.value)
    h = property(lambda self: self.blocks.value | self.numbers.value)

    def is_diagonal(self, name, leaf):
        return leaf.ndim < 2 or name in self.diagonal_names

    def groups(self, name, wide):
        """[(key, rows [b, m])] of a leaf whose rows are the shorter side."""
        n = wide.shape[-2]
        b = min(self.block_size, n)
        return [
            ((name, index, first), wide[index][first : first + b])
            for index in np.ndindex(wide.shape[:-2])
            for first in range(0, n, b)
        ]

    def ahead(self, grads):
        t, b = self.count + 1, self.b1
        if not self.nesterov:
            return tree(lambda m: m / (1 - b**t), self.m)
        mass, next_mass = 1 - b**t, 1 - b ** (t + 1)
        return tree(lambda m, g: b * m / next_mass + (1 - b) * g / mass, self.m, grads)

    def refresh(self, C):
        # Any finite Z would do for a block that has seen no gradient.
        norms = {key: np.linalg.norm(block) for key, block in C.items()}
        self.Z = {
            key: inverse_square_root(block / norms[key], self.eps) if norms[key] else 0 * block
            for key, block in C.items()
        }

    def precondition(self, name, n, C):
        wide = widened(n)
        direction = np.zeros_like(wide)
        for key, rows in self.groups(name, wide):
            (_, index, first), norm = key, np.linalg.norm(C[key])
            if norm > 0:
                direction[index][first : first + len(rows)] = self.Z[key] @ rows / np.sqrt(norm)
        if self.rms is not None:
            size = np.sqrt((direction**2).mean((-2, -1), keepdims=True))
            direction = self.rms * direction / np.where(size > 0, size, 1)
        return direction if wide.shape == n.shape else direction.swapaxes(-1, -2)

    def direct(self, grads, hessian=None, refresh=None):
        grads = tree(np.array, grads)
        self.momentum.add(grads)
        N = self.ahead(grads)
        matrices = {name: n for name, n in N.items() if not self.is_diagonal(name, n)}
        rows = [pair for name, n in matrices.items() for pair in self.groups(name, widened(n))]
        self.blocks.add({key: x @ x.T / x.shape[1] for key, x in rows})
        self.numbers.add({name: g * g for name, g in grads.items() if name not in matrices})
        C, V = self.blocks.read(True), self.numbers.read(True)
        if self.count % self.update_interval == 0 if refresh is None else refresh:
            self.refresh(C)
        self.direction = {
            name: self.precondition(name, n, C)
            if name in matrices
            else n / np.sqrt(np.where(V[name] > 0, V[name], np.inf))
            for name, n in N.items()
        }
        self.count += 1
        return self.direction

    def step(self, params, grads, hessian=None, refresh=None, value=None):
        lr = rate(self.learning_rate, self.count)
        direction = self.direct(grads, refresh=refresh)
        return descend(params, direction, lr, self.weight_decay, self.decay_names)
