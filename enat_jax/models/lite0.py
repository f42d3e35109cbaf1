"""EfficientNet-Lite0 (arXiv:1905.11946, without squeeze-and-excitation and with ReLU6).

A small classifier of ImageNet under the Apache licence. Strides of 2 pad as TensorFlow does, more
on the right and at the bottom. Batch normalisation is part of the convolutions:
``evaluation/perceptual_weights.py`` folds it in.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from enat_jax.models import resnet

NUM_CLASSES = 1000
_STEM = 32  # channels
_HEAD = 1280


class Stage(NamedTuple):
    """Blocks of the same size; the first of them halves the grid if ``stride`` is 2."""

    blocks: int
    size: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)

Grid = Float[Array, "b h w c"]


def _conv(features: int, size: int, dtype: DTypeLike, name: str, stride: int = 1) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        dtype=dtype,
        precision=jax.lax.Precision.HIGHEST,
        name=name,
    )


class Depthwise(nn.Module):
    """A convolution of each channel alone, as a sum of slices.

    The gradient of the same as a convolution is many times slower on a CPU.
    """

    size: int
    stride: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Grid) -> Grid:
        """Returns [b, h / stride, w / stride, c]."""
        channels = x.shape[-1]
        shape = (self.size, self.size, 1, channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        sides = [-(-n // self.stride) for n in x.shape[1:3]]
        spans = [(n - 1) * self.stride + 1 for n in sides]
        rests = [max(0, m + self.size - 1 - n) for m, n in zip(spans, x.shape[1:3], strict=True)]
        edges = [(rest // 2, rest - rest // 2) for rest in rests]
        padded = jnp.pad(x, [(0, 0), *edges, (0, 0)]).astype(jnp.float32)
        found = bias.astype(jnp.float32)
        for i in range(self.size):
            for j in range(self.size):
                part = padded[:, i : i + spans[0] : self.stride, j : j + spans[1] : self.stride]
                found = found + part * kernel[i, j, 0].astype(jnp.float32)
        return found.astype(self.dtype)


class Block(nn.Module):
    """An inverted residual block: wider, a convolution of each channel alone, narrower again."""

    stage: Stage
    stride: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Grid) -> Grid:
        """Returns [b, h / stride, w / stride, stage.channels]."""
        wide = x.shape[-1] * self.stage.expansion
        h = x
        if self.stage.expansion > 1:
            h = nn.relu6(_conv(wide, 1, self.dtype, "expand")(h))
        depthwise = Depthwise(self.stage.size, self.stride, self.dtype, name="depthwise")
        h = nn.relu6(depthwise(h))
        h = _conv(self.stage.channels, 1, self.dtype, "project")(h)
        return h + x if h.shape == x.shape else h


class Lite0(nn.Module):
    """The classifier of ImageNet's 1000 classes.

    Attributes:
        dtype: of the convolutions. The last layer and what is returned are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> dict[str, Float[Array, "b c"]]:
        """Returns float32 arrays by name.

        logits [b, 1000]: of ImageNet's classes.
        stage_1 [b, 16] to stage_7 [b, 320]: means of the features after each stage.

        Args:
            images: of ``scaled``, of 224x224 pixels for logits as they were trained.
        """
        x = nn.relu6(_conv(_STEM, 3, self.dtype, "stem", 2)(images))
        found, number = {}, 0
        for i, stage in enumerate(STAGES):
            for j in range(stage.blocks):
                x = Block(stage, 1 if j else stage.stride, self.dtype, name=f"block_{number}")(x)
                number += 1
            found[f"stage_{i + 1}"] = x.astype(jnp.float32).mean((1, 2))
        x = nn.relu6(_conv(_HEAD, 1, self.dtype, "head")(x))
        dense: Any = nn.Dense(NUM_CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")
        found["logits"] = dense(x.astype(jnp.float32).mean((1, 2)))
        return found


def scaled(images: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
    """Returns pictures of [0, 1] in the range that the network takes, float32."""
    return (255 * jnp.asarray(images, jnp.float32) - 127) / 128


def preprocess(images: Float[Array, "b H W 3"]) -> Float[Array, "b 224 224 3"]:
    """Returns pictures of [0, 1] as ``Lite0`` was trained on them, float32."""
    return scaled(resnet.resized(images))
