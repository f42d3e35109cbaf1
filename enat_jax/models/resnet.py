"""ResNet-50 of version 1.5 (arXiv:1512.03385), which halves in the 3x3 convolutions.

Layers have the names of torchvision's ``resnet50``. Batch normalisation is part of the
convolutions: ``evaluation/perceptual_weights.py`` folds it in.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

SIZE = 224  # height and width in pixels of the pictures that the network was trained on
NUM_CLASSES = 1000
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1]
STD = (0.229, 0.224, 0.225)
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # channels inside of blocks, blocks
_EXPANSION = 4  # of a block's output

Grid = Float[Array, "b h w c"]


def _conv(features: int, size: int, dtype: DTypeLike, name: str, stride: int = 1) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        dtype=dtype,
        precision=jax.lax.Precision.HIGHEST,
        name=name,
    )


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 around which the input is added.

    Attributes:
        channels: of the first two.
        stride: of the second.
        project: whether the input passes a convolution before it is added.
        dtype: of the convolutions.
    """

    channels: int
    stride: int
    project: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Grid) -> Grid:
        """Returns [b, h / stride, w / stride, 4 * channels]."""
        wide = _EXPANSION * self.channels
        h = nn.relu(_conv(self.channels, 1, self.dtype, "conv1")(x))
        h = nn.relu(_conv(self.channels, 3, self.dtype, "conv2", self.stride)(h))
        h = _conv(wide, 1, self.dtype, "conv3")(h)
        if self.project:
            x = _conv(wide, 1, self.dtype, "downsample", self.stride)(x)
        return nn.relu(h + x)


class ResNet50(nn.Module):
    """The classifier of ImageNet's 1000 classes.

    Attributes:
        dtype: of the convolutions. The last layer and the logits are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b 1000"]:
        """Returns logits, float32.

        Args:
            images: of ``preprocess``; larger and smaller ones are possible.
        """
        x = nn.relu(_conv(64, 7, self.dtype, "conv1", 2)(images))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, (channels, blocks) in enumerate(STAGES):
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                name = f"layer{stage + 1}_{i}"
                x = Bottleneck(channels, stride, not i, self.dtype, name=name)(x)
        pooled = x.astype(jnp.float32).mean((1, 2))
        dense: Any = nn.Dense(NUM_CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")
        return dense(pooled)


def preprocess(images: Float[Array, "b H W 3"]) -> Float[Array, "b 224 224 3"]:
    """Returns pictures of [0, 1] as ``ResNet50`` takes them, float32."""
    return (resized(images) - jnp.array(MEAN)) / jnp.array(STD)


def resized(images: Float[Array, "b H W 3"]) -> Float[Array, "b 224 224 3"]:
    """Returns float32 pictures of 224x224 pixels, bilinearly and smoothed where they shrink.

    PyTorch's ``interpolate(mode="bilinear", antialias=True)`` does the same.
    """
    shape = (len(images), SIZE, SIZE, images.shape[-1])
    precision = jax.lax.Precision.HIGHEST
    x = jnp.asarray(images, jnp.float32)
    return jax.image.resize(x, shape, "bilinear", antialias=True, precision=precision)
