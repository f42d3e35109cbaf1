"""Losses of the transformer."""

import jax
import jax.numpy as jnp


def smoothed_cross_entropy(logits, targets, smoothing):
    """Cross-entropy with label smoothing for each token (method: reference, Section 4).

    The target distribution is ``(1 - smoothing) one-hot + smoothing uniform`` over all v codes.

    Args:
        logits: float [..., v].
        targets: int [...], 0 <= target < v.
        smoothing: in [0, 1).

    Returns:
        float32 [...].
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -(1 - smoothing) * picked - smoothing * log_probs.mean(axis=-1)


def masked_mean(values, real, num_real):
    """Mean of ``values`` [b, m] over real slots, ``num_real`` of them in each row.

    ``real``: bool, broadcastable to [b, m]; None: all. Padding may hold anything, even NaN.
    """
    if real is not None:
        values = jnp.where(real, values, 0.0)
    return values.sum() / (values.shape[0] * num_real)
