"""The hard-concrete distribution: gates in [0, 1] that are exactly 0 or 1 with some probability.

References:
    Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization,
    ICLR 2018, equations 10 to 12.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BETA = 2 / 3
GAMMA = -0.1
ZETA = 1.1


def hard_concrete(
    log_alpha: Float[Array, "*groups"],
    *,
    uniform: Float[Array, "*groups"] | None,
    beta: float = BETA,
) -> Float[Array, "*groups"]:
    """Samples gates ``z = clip(s·(ζ − γ) + γ, 0, 1)``, ``s = σ((logit u + log α) / β)``.

    Args:
        log_alpha: location; gates are open where it is large.
        uniform: the noise ``u``, uniform in [0, 1); ``None`` for the median gate, ``u = ½``, as
            in the paper's release.
        beta: temperature β.

    Returns:
        Gates in [0, 1], with the shape and dtype of ``log_alpha``.
    """
    noise = jnp.zeros_like(log_alpha)
    if uniform is not None:
        # Samplers return 0, and rounding gives 1; their logits are infinite.
        tiny = float(jnp.finfo(log_alpha.dtype).eps)
        u = jnp.clip(uniform.astype(log_alpha.dtype), tiny, 1 - tiny)
        noise = jnp.log(u) - jnp.log1p(-u)
    s = jax.nn.sigmoid((noise + log_alpha) / beta)
    return jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)


def probability_open(
    log_alpha: Float[Array, "*groups"],
    *,
    beta: float = BETA,
) -> Float[Array, "*groups"]:
    """``P(z ≠ 0) = σ(log α − β·log(−γ/ζ))``.

    Args:
        log_alpha: location.
        beta: temperature β.

    Returns:
        Probabilities, with the shape and dtype of ``log_alpha``.
    """
    return jax.nn.sigmoid(log_alpha - beta * math.log(-GAMMA / ZETA))
