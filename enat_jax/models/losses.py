"""Losses of the transformer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from enat_jax.models import shapes
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
    axes = {f"logits.shape[{i}]": size for i, size in enumerate(logits.shape[:-1])}
    shapes.check("targets", targets, **axes)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -(1 - smoothing) * picked - smoothing * log_probs.mean(axis=-1)


def masked_mean(
    values: Float[Array, "b m"],
    real: Bool[Array, "#b m"] | Bool[Array, " m"] | None,
    num_real: Count,
) -> Float[Array, ""]:
    """Returns the mean of ``values`` over all real slots of the batch, as the reference's loss.

    A slot weighs the same in every image, so an image with more real slots weighs more.

    Args:
        values: padding may hold anything, even NaN.
        real: which slots are real, [m] where it is the same for all images; None: all.
        num_real: real slots of every image, or of each.
    """
    shapes.check("values", values, b=None, m=None)
    b, m = values.shape
    shapes.check_count("num_real", num_real, b)
    if real is not None:
        real = real if real.ndim > 1 else real[None]
        shapes.check("real", real, b={1, b}, m=m)
        values = jnp.where(real, values, 0.0)
    return values.sum() / (jnp.sum(num_real) if jnp.ndim(num_real) else b * num_real)
