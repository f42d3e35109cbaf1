"""Small convolutional networks that images are compared by where there is no Inception."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from enat_jax.models import shapes

_PRECISION = jax.lax.Precision.HIGHEST  # as features are compared between devices


def to_float(images: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Returns images as the networks take them, float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


class ConvFeatures(nn.Module):
    """Features of images of any size: convolutions, then means over all places.

    Attributes:
        widths: of the convolutions, each 3x3 with stride 2 and ReLU; the last is that of the
            features.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b features"]:
        """Returns the features of images in [-1, 1], float32, not negative."""
        shapes.check("images", images, b=None, h=None, w=None, c=None)
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
    """A linear classifier of ``ConvFeatures``; parameters and results are float32.

    Attributes:
        num_classes: of the logits.
        image_channels: c.
        widths: see ``ConvFeatures``.
    """

    num_classes: int
    image_channels: int
    widths: Sequence[int] = (16, 32, 64)

    def setup(self) -> None:
        self.features = ConvFeatures(self.widths)
        self.head = nn.Dense(self.num_classes, precision=_PRECISION)

    def __call__(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b features"], Float[Array, "b classes"]]:
        """Returns features and logits of images in [-1, 1]."""
        shapes.check("images", images, b=None, h=None, w=None, c=self.image_channels)
        features = self.features(images)
        return features, self.head(features)
