"""Losses of the transformer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from enat_jax.models.blocks import Count


def smoothed_cross_entropy(
    logits: Float[Array, "*b v"], targets: Int[Array, "*b"], smoothing: float
) -> Float[Array, "*b"]:
    """Returns the cross-entropy with label smoothing of each token, in nats, float32.

    The target distribution is ``(1 - smoothing) one-hot + smoothing uniform`` over all v codes
    (arXiv:1512.00567, Section 7; the reference smooths by 0.1).

    Args:
        logits: of any float dtype.
        targets: codes in 0 <= target < v.
        smoothing: in [0, 1).
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -(1 - smoothing) * picked - smoothing * log_probs.mean(axis=-1)


def masked_mean(
    values: Float[Array, "b m"], real: Bool[Array, "#b m"] | None, num_real: Count
) -> Float[Array, ""]:
    """Returns the mean of ``values`` over the real slots, ``num_real`` of them in each row.

    ``real``: which they are; None: all. Padding may hold anything, even NaN.
    """
    if real is not None:
        values = jnp.where(real, values, 0.0)
    return values.sum() / (values.shape[0] * num_real)
