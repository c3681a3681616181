"""SOAA and its predecessor Tadam: Adam's moments in a ratio, inside an adaptive trust region."""

import jax
import optax

from sophia_optax.optimizers.decay_and_rate import Mask, check_averages, decay_and_rate
from sophia_optax.transforms.centered_moment import centered_second_moment
from sophia_optax.transforms.clip_by_ratio import clip_by_ratio
from sophia_optax.transforms.denominators import rms_floor
from sophia_optax.transforms.gains import ratio_of_sums, sum_of_ratios
from sophia_optax.transforms.moments import ema, second_moment
from sophia_optax.transforms.trust_region import trust_region

ArrayLike = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike


def soaa(
    learning_rate: optax.ScalarOrSchedule,
    total_steps: ArrayLike,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    gamma: ArrayLike = 0.25,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    hessian_dtype: DTypeLike | None = None,
    rule: str = "soaa",
    loss_correction: str = "seen",
) -> optax.GradientTransformationExtraArgs:
    r"""SOAA: Adam, or a Newton step with a Fisher diagonal, inside an adaptive trust region.

        m̂, ŝ = Adam's moments, bias-corrected
        F = (1 + Σ m̂² / Σ (ŝ + eps)) ŝ                            rule "soaa"
        F = (1 + Σ (m̂² / (v̂ + eps))) v̂, v̂ the centered moment     rule "tadam"
        a = r m̂ / (max(r F, sqrt(ŝ)) + eps)
        θ <- θ - lr (a + weight_decay θ)

    with the radius r of `trust_region`. Gradients of language models are so small that sqrt(ŝ)
    exceeds r F everywhere: there this is Adam times r.

    Args:
      learning_rate: a scalar or a schedule.
      total_steps: T, the length of the run, over which the bounds of r narrow.
      b1: decay of the momentum and of the average loss.
      b2: decay of the second moment.
      gamma: width of the bounds of r.
      eps: added to the denominators, and floor of the predicted reduction; above 0.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: pytree of bools shaped as params, or a function of params that returns
        one.
      mu_dtype: dtype of m; None is the parameter's.
      hessian_dtype: dtype of the second moments; "bfloat16" is rounded stochastically.
      rule: "soaa" (algorithm 1 as printed) or "tadam" (its predecessor, which holds one more
        moment).
      loss_correction: how the average loss is bias-corrected: "seen" by the weight of the losses
        seen, "steps" by 1 - b1^t as printed. The two differ if some updates pass no `value`.

    Extra arguments of `update`:
      value: the loss of this step, a scalar; without it r stays. `optax.MultiSteps` passes on the
        value of the last micro-step only, so pass the mean over the micro-steps there.

    Returns:
      A transformation. Its state holds the moments and r (`TrustRegionState`).

    Raises:
      ValueError: an argument is out of range.

    Source: SOAA, algorithm 1; Tadam's published code. SOAA's algorithm uses a v̂ that it never
    updates, which we read as ŝ. The paper gives no default weight decay.

    >>> import jax.numpy as jnp
    >>> tx = soaa(.1, total_steps=100)
    >>> g = jnp.array([.03, -.04])
    >>> u, state = tx.update(g, tx.init(g), g, value=2.)
    >>> print(jnp.array_str(u, precision=2), state[0].radius)
    [-0.1  0.1] 1.0
    """
    check_averages(b1, b2, mu_dtype, hessian_dtype)
    adam = second_moment(b2, dtype=hessian_dtype)
    centered = rule == "tadam"
    return optax.chain(
        trust_region(
            clip_by_ratio(
                ema(b1, accumulator_dtype=mu_dtype),
                centered_second_moment(b1, b2, eps, dtype=hessian_dtype) if centered else adam,
                second_moment=adam if centered else None,
                gain=sum_of_ratios(eps) if centered else ratio_of_sums(eps),
                denominator=rms_floor(1.0, eps),
                clip_threshold=None,
            ),
            learning_rate,
            total_steps=total_steps,
            b1=b1,
            eps=eps,
            gamma=gamma,
            rule=rule,
            loss_correction=loss_correction,
        ),
        *decay_and_rate(weight_decay, weight_decay_mask, learning_rate),
    )
