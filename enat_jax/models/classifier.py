"""Small convolutional networks that images are compared by where there is no Inception."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

_PRECISION = jax.lax.Precision.HIGHEST  # as features are compared between devices


def to_float(images: jax.Array) -> jax.Array:
    """uint8 images -> float32 in [-1, 1], what the networks take."""
    return images.astype(jnp.float32) / 127.5 - 1


class ConvFeatures(nn.Module):
    """Images [b, h, w, c] of any size -> features, float32 [b, widths[-1]], not negative.

    A 3x3 convolution with stride 2 and ReLU for each width, then means over all places.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i, width in enumerate(self.widths):
            conv = nn.Conv(
                width,
                (3, 3),
                strides=2,
                kernel_init=nn.initializers.he_normal(),
                precision=_PRECISION,
                name=f"conv_{i}",
            )
            x = nn.relu(conv(x))
        return x.mean((1, 2))


class Classifier(nn.Module):
    """Images [b, h, w, image_channels] -> (features [b, widths[-1]], logits [b, num_classes]).

    Parameters and results are float32.
    """

    num_classes: int
    image_channels: int
    widths: Sequence[int] = (16, 32, 64)

    def setup(self):
        self.features = ConvFeatures(self.widths)
        self.head = nn.Dense(self.num_classes, precision=_PRECISION)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = self.features(images)
        return features, self.head(features)
