"""Losses of the transformer, and of the tokenizer's discriminator.

Adversarial losses are means over all logits, of all cells of all pictures, so they are the same
however a batch is divided.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from enat_jax.models import shapes
from enat_jax.models.blocks import Count

ADVERSARIAL = ("hinge", "non_saturating")  # kinds of the losses of discriminator and tokenizer
LECAM_DECAY = 0.999  # of the moving averages of mean logits


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


def discriminator_loss(
    kind: str, real: Float[Array, "b h w"], fake: Float[Array, "b h w"]
) -> Float[Array, ""]:
    """Returns what a discriminator minimises, float32.

    "hinge" (arXiv:1705.02894) is ``(E relu(1 - real) + E relu(1 + fake)) / 2``, 1 for a
    discriminator that knows nothing; "non_saturating" (arXiv:1406.2661) is
    ``E softplus(-real) + E softplus(fake)``, then 1.386.

    Args:
        kind: one of ``ADVERSARIAL``.
        real: logits of pictures; means are taken over all of them.
        fake: logits of reconstructions that no gradient is to reach.

    Raises:
        ValueError: the kind is unknown.
    """
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    if _adversarial(kind) == "hinge":
        return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2
    return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()


def generator_loss(kind: str, fake: Float[Array, "b h w"]) -> Float[Array, ""]:
    """Returns what a tokenizer minimises to be taken for real, float32.

    "hinge" is ``-E fake``, which has no bound and is negative where the tokenizer wins;
    "non_saturating" is ``E softplus(-fake)``.

    Args:
        kind: one of ``ADVERSARIAL``.
        fake: logits of reconstructions.

    Raises:
        ValueError: the kind is unknown.
    """
    fake = fake.astype(jnp.float32)
    return -fake.mean() if _adversarial(kind) == "hinge" else jax.nn.softplus(-fake).mean()


def _adversarial(kind: str) -> str:
    if kind not in ADVERSARIAL:
        raise ValueError(f"adversarial loss {kind!r} is unknown: one of {', '.join(ADVERSARIAL)}")
    return kind


def lecam(
    real_mean: Float[Array, ""], fake_mean: Float[Array, ""], means: Float[Array, "2"]
) -> Float[Array, ""]:
    """Returns LeCam's regulariser of a discriminator (arXiv:2104.03310), float32, unweighted.

    It holds the mean logits of pictures and reconstructions to the moving averages of each other:
    ``relu(real_mean - means[1]) ** 2 + relu(means[0] - fake_mean) ** 2``.

    Args:
        real_mean, fake_mean: means of the logits of this step.
        means: moving averages of both, see ``updated_lecam``. No gradient reaches them.
    """
    ema_real, ema_fake = jax.lax.stop_gradient(means)
    above = jax.nn.relu(real_mean - ema_fake)
    below = jax.nn.relu(ema_real - fake_mean)
    return jnp.square(above) + jnp.square(below)


def updated_lecam(
    real_mean: Float[Array, ""], fake_mean: Float[Array, ""], means: Float[Array, "2"]
) -> Float[Array, "2"]:
    """Returns the moving averages for the next step's ``lecam``; zeros before the first.

    Args:
        real_mean, fake_mean, means: what this step's ``lecam`` was given.
    """
    new = jnp.stack([real_mean, fake_mean]).astype(jnp.float32)
    return LECAM_DECAY * means + (1 - LECAM_DECAY) * new


def gradient_penalty(
    apply: Callable[[Float[Array, "b H W c"]], Float[Array, "b h w"]],
    images: Float[Array, "b H W c"],
) -> Float[Array, ""]:
    """Returns the penalty R1 of a discriminator at pictures (arXiv:1801.04406), unweighted.

    It is the mean over pictures of the squared norm of the gradient of a picture's mean logit with
    respect to its pixels. MaskGIT adds 10 of it at every step.

    Args:
        apply: from images to logits; of a picture they must not depend on the others. A gradient of
            a gradient needs float32, so let it compute in that.
        images: real pictures.
    """

    def sum_of_means(images: Float[Array, "b H W c"]) -> Float[Array, ""]:
        return apply(images).mean((1, 2)).sum()

    gradient = jax.grad(sum_of_means)(images.astype(jnp.float32))
    return jnp.square(gradient).sum((1, 2, 3)).mean()
