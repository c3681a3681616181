"""OrthoSoph: momentum orthogonalised block by block, at a fraction of Muon's cost."""

import jax
import optax

from sophia_optax import checks
from sophia_optax.optimizers.decay_and_rate import Mask, decay_and_rate
from sophia_optax.transforms.blocks import scale_by_blocks

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


def orthosoph(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.0,
    eps: ArrayLike = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    weight_decay_mask: Mask = None,
    block_size: int = 128,
    update_interval: ArrayLike = 1,
    form: str = "rows",
    b2_vector: ArrayLike = 0.95,
    mu_dtype: DTypeLike | None = "bfloat16",
    rms: ArrayLike | None = 0.2,
    nesterov: bool = True,
    block_mask: Mask = None,
    b2_numbers: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""OrthoSoph: momentum orthogonalised in blocks of rows, or whitened by tiles.

        M <- b1 M + (1 - b1) G,  N = b1 M + (1 - b1) G, both corrected for their bias
        C <- b2 C + (1 - b2) N Nᵀ / c
        θ <- θ - lr (scaled to rms: (C + eps ‖C‖_F I)^(-1/2) N, + weight_decay θ)

    for each group of b rows of a matrix. Rows run along the shorter side of the matrix and are c
    long. Leaves that hold no matrix, such as vectors, take Adam's direction. With one block for
    each matrix this is Muon. Smaller blocks cost fewer FLOPs (1/14 of Muon's at 768 x 768 with
    b = 128), and need no other device if b divides the rows on each.

    Args:
      learning_rate: a scalar or a schedule. A matrix moves by learning_rate times `rms`, as a root
        mean square in units of the parameter, so AdamW's learning rates fit.
      b1: decay of the momentum, in [0, 1).
      b2: decay of C, in [0, 1), per update.
      eps: ridge, relative to ‖C‖_F with rows, absolute with tiles. It is raised to 4 b ulp ‖C‖_F,
        the resolution of float32 (6e-5 ‖C‖_F for b = 128).
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that returns
        one.
      block_size: b, a static integer. Larger blocks work better, up to the shorter side.
      update_interval: updates between inverse square roots.
      form: "rows", or "tiles" for the paper's tiles of b x b.
      b2_vector: with rows, decay of the second moment of leaves that hold no matrix.
      mu_dtype: dtype of M; None is the parameter's.
      rms: root mean square of each matrix's direction; None does not rescale it
        (`scale_by_blocks`).
      nesterov: N as above; False uses M as N.
      block_mask: which leaves hold matrices in their last two axes: a pytree of bools, or a
        function of params that returns one. None selects all leaves of two axes or more.
      b2_numbers: deprecated name of `b2_vector`. It warns.

    Extra arguments of `update`:
      renew: whether to take roots now, a bool; None lets the counter decide. It is ignored if
        `update_interval=1`.
      refresh: read if `renew` is None.

    Returns:
      A transformation. Its state (`ScaleByBlocksState`) holds M, and C and the roots if they are
      used again. With the defaults it takes a quarter of AdamW's bytes for GPT-2 125M.

    Raises:
      ValueError: an argument is out of range, or `block_mask` selects a leaf that holds no matrix.
      TypeError: `block_size` is traced.

    Source: "OrthoSoph: Analyzing Trade-offs in Memory-Efficient Second-Order Optimization", 2025.
    It states no update rule. We interpret its tiles, each with its own b x b curvature, as
    `form="tiles", b2=.99, rms=None, mu_dtype=None, eps=1e-8, nesterov=False`:
    (C + eps I)^(-1/2) M with C <- b2 C
    + (1 - b2) G Gᵀ, which holds as many numbers as Adam. Rows are ours; averaging gradients instead
    of momentum in C was worse (LOG.md).
    To inject hyperparameters: `optax.inject_hyperparams(orthosoph, static_args=("block_size",
    "block_mask", "weight_decay_mask", "b2", "update_interval"),
    hyperparam_dtype=jnp.float32)(...)`.
    If b2 and update_interval are traced as well, C and the roots are kept.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda w: jnp.sum((w - jnp.eye(2)) ** 2)
    >>> w, tx = jnp.zeros((2, 2)), orthosoph(.2)
    >>> state = tx.init(w)
    >>> @jax.jit
    ... def step(w, state):
    ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
    ...     return optax.apply_updates(w, updates), state
    >>> for _ in range(40):
    ...     w, state = step(w, state)
    >>> print(bool(loss(w) < loss(jnp.zeros((2, 2))) / 10))
    True
    """
    return optax.chain(
        scale_by_blocks(
            b1=b1,
            b2=b2,
            eps=eps,
            block_size=block_size,
            update_interval=update_interval,
            form=form,
            b2_vector=checks.renamed(
                "orthosoph", "b2_numbers", b2_numbers, "b2_vector", b2_vector, 0.95
            ),
            mu_dtype=mu_dtype,
            rms=rms,
            nesterov=nesterov,
            block_mask=block_mask,
        ),
        *decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
    )
