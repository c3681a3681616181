"""Optimizers of optax on the command line, so that ours meet them in one harness.

Each is a config whose `make` takes a schedule and, by keyword, what only some need. Decay is
decoupled, multiplied by the learning rate, and moves matrices only; those without a
`weight_decay` have none in optax either.
"""

import dataclasses

import optax

from train.optimizers.layerwise import dimension_numbers, each_layer, matrices, of_two_axes


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay: what the others are compared with.

        step = -lr (m / (sqrt(v) + eps) + weight_decay p)

    m averages gradients, v their squares, both corrected for their bias. The state takes 8 bytes
    a parameter. Tune the learning rate first, then b1 or the decay. `optax.adamw`.
    """

    learning_rate: float = 6e-4
    """Peak learning rate: about the change of each parameter in a step."""
    b1: float = 0.9
    """Decay of m, which averages 1 / (1 - b1) steps; short runs want .8."""
    b2: float = 0.95
    """Decay of v; .95 to .99 for language models, more recovers slowly from spikes."""
    eps: float = 1e-8
    """Added to the denominator; raise it if rarely used parameters jump."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        return optax.adamw(
            learning_rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=matrices
        )


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam without weight decay.

        step = -lr m / (sqrt(v) + eps)

    m averages gradients, v their squares, both corrected for their bias. The state takes 8 bytes
    a parameter. `optax.adam`.
    """

    learning_rate: float = 6e-4
    """Peak learning rate; AdamW's fits."""
    b1: float = 0.9
    """Decay of m, which averages 1 / (1 - b1) steps; short runs want .8."""
    b2: float = 0.95
    """Decay of v; .95 to .99 for language models, more recovers slowly from spikes."""
    eps: float = 1e-8
    """Added to the denominator; raise it if rarely used parameters jump."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        return optax.adam(learning_rate, self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True)
class Lion:
    """The sign of a momentum.

        step = -lr (sign(b1 m + (1 - b1) g) + weight_decay p)

    m averages gradients. Every parameter moves by the learning rate in every step, so the rate is
    a third to a tenth of AdamW's, and the decay larger. The state takes 4 bytes a parameter.
    `optax.lion`.
    """

    learning_rate: float = 1e-4
    """Peak learning rate: the change of every parameter in a step."""
    b1: float = 0.95
    """Share of the momentum, as against the gradient, in the sign."""
    b2: float = 0.98
    """Decay of m, which averages 1 / (1 - b2) steps; short runs want .9."""
    weight_decay: float = 0.2
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        return optax.lion(
            learning_rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=matrices
        )


@dataclasses.dataclass(frozen=True)
class Sm3:
    """Adagrad with one number for each row and each column.

        step = -lr m,  m the average of g / sqrt(v + eps)

    v is the least of the row's and the column's number, each the largest sum of squares so far.
    With b2 = 1 sums only grow, and steps shrink on top of the schedule. The state takes 4 bytes
    a parameter, for m. No weight decay. `optax.scale_by_sm3` (`optax.sm3` takes no schedule).
    """

    learning_rate: float = 0.1
    """Peak learning rate; some ten times Adam's, since v is a sum of all squares."""
    momentum: float = 0.9
    """Decay of m, which averages 1 / (1 - momentum) steps."""
    b2: float = 1.0
    """Decay of the squares; 1, the paper's, forgets none, .99 follows the gradient."""
    eps: float = 1e-8
    """Added to v, under the root."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        return optax.chain(  # optax.sm3 takes no schedule
            each_layer(optax.scale_by_sm3(self.momentum, self.b2, self.eps)),
            optax.scale_by_learning_rate(learning_rate),
        )


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adam with a second moment made of row and column means.

        step = -lr (scale clip(g / sqrt(v)) + weight_decay p)

    scale is the root mean square of the tensor, so the learning rate is relative; the clip bounds
    the root mean square of the direction. Without momentum the state takes next to nothing: one
    number for each row and column. `optax.adafactor`.
    """

    learning_rate: float = 1e-2
    """Peak learning rate: the change of a tensor in a step, as a share of its size."""
    multiply_by_parameter_scale: bool = True
    """Without it the learning rate is absolute, and about AdamW's fits."""
    decay_rate: float = 0.8
    """v decays by 1 - t^-decay_rate at step t."""
    min_dim_size_to_factor: int = 128
    """Matrices with a shorter side than this keep every number of v."""
    clipping_threshold: float = 1.0
    """Largest root mean square of a tensor's direction, 1 or more."""
    momentum: float = 0.0
    """Decay of an average of steps, for 4 bytes a parameter; 0 is none."""
    eps: float = 1e-30
    """Added to the squared gradient."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        tx = optax.adafactor(
            learning_rate,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            decay_rate=self.decay_rate,
            multiply_by_parameter_scale=self.multiply_by_parameter_scale,
            clipping_threshold=self.clipping_threshold,
            momentum=self.momentum or None,
            # optax leaves the learning rate out of this decay
            weight_decay_rate=lambda count: self.weight_decay * learning_rate(count),
            eps=self.eps,
            weight_decay_mask=of_two_axes,
        )
        return each_layer(tx)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Momentum made orthogonal; vectors go by Adam.

        step = -lr (consistent_rms sqrt(longer side) U Vᵀ + weight_decay p),  m = U S Vᵀ

    m averages gradients, with a step of momentum ahead (Nesterov). Every matrix is treated so,
    embeddings included. The state takes 4 bytes a parameter. `optax.contrib.muon`.
    """

    learning_rate: float = 6e-4
    """Peak learning rate; AdamW's, up to a few times that."""
    beta: float = 0.95
    """Decay of m, which averages 1 / (1 - beta) steps."""
    consistent_rms: float = 0.2
    """Root mean square of a matrix's direction; .2 is about AdamW's."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        return optax.contrib.muon(
            learning_rate,
            beta=self.beta,
            consistent_rms=self.consistent_rms,
            weight_decay=self.weight_decay,
            weight_decay_mask=matrices,
            muon_weight_dimension_numbers=dimension_numbers,
        )


@dataclasses.dataclass(frozen=True)
class GaLore:
    """Adam on gradients projected to a low rank.

        step = -lr (scale P adam(Pᵀ g) + weight_decay p)

    P holds the first `rank` singular vectors of a gradient, renewed every update_proj_gap steps.
    The state of an n x m matrix, n <= m, takes 4 rank (2 n + m) bytes, so set the rank to half the
    width at most; on a mesh every device holds it whole. Embeddings are projected too, which the
    paper's code does not do; vectors go by Adam. `optax.contrib.galore`.
    """

    learning_rate: float = 1e-2
    """Peak learning rate; for matrices it is times `scale`."""
    rank: int = 128
    """Directions kept of each matrix; the paper takes a quarter to half of the width."""
    update_proj_gap: int = 200
    """Steps between projections, each a decomposition of every matrix."""
    scale: float = 0.25
    """Factor on the direction of matrices, the paper's alpha."""
    b1: float = 0.9
    """Decay of Adam's first moment, which a new projection leaves as it is."""
    b2: float = 0.999
    """Decay of Adam's second moment, which a new projection leaves as it is."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate; 0 turns it off."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        tx = optax.contrib.galore(
            learning_rate,
            rank=self.rank,
            update_proj_gap=self.update_proj_gap,
            scale=self.scale,
            base_optimizer=optax.scale_by_adam(self.b1, self.b2, self.eps),
            weight_decay=self.weight_decay,
            mask=of_two_axes,
        )
        return each_layer(tx)


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Gradient descent with momentum.

        step = -lr m,  m <- momentum m + g

    The state takes 4 bytes a parameter. No weight decay. `optax.sgd`.
    """

    learning_rate: float = 0.1
    """Peak learning rate; it depends on the gradient's scale: tune it for each model."""
    momentum: float = 0.9
    """Decay of m; steps are 1 / (1 - momentum) times as long."""
    nesterov: bool = False
    """Take one step of momentum ahead."""

    def make(self, learning_rate: optax.Schedule, **unused):
        """The transformation."""
        return optax.sgd(learning_rate, self.momentum, self.nesterov)
