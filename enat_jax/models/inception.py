"""The Inception-v3 that FID is defined by: the TensorFlow graph of 2015-12-05 (arXiv:1512.00567).

It is not the Inception-v3 of today's libraries: it has 1008 classes, its pooling branches average
without counting the padding, and that of the last block takes the maximum instead. Names are those
of torchvision's ``inception_v3``, as in the weights of pytorch-fid. Batch normalisation is part of
the convolutions: ``inception_weights`` folds it in. All is float32, and no product is rounded to
fewer bits, on any device.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from enat_jax.models import shapes

SIZE = 299  # height and width in pixels of the images that the network takes
NUM_CLASSES = 1008
RESIZES = ("pytorch-fid", "adm")
SPATIAL_CHANNELS = 7  # channels of a layer that sFID takes


def preprocess(
    images: Real[Array | np.ndarray, "b h w c"], resize: str
) -> Float[Array, "b 299 299 3"]:
    """Returns images as ``Inception`` takes them, float32.

    Args:
        images: of 0 to 255, with 3 channels or 1, which stands for three equal ones.
        resize: how the size is changed, bilinearly and without antialiasing in either case, and how
            pixels are scaled. Features of one must not be compared with those of the other.
            "pytorch-fid": pixel centres at half-integers, as PyTorch's ``interpolate``; 0 to 255
            becomes -1 to 1.
            "adm": pixel i of the output at i * size / 299 of the input, which shifts the image by
            less than a pixel, as TensorFlow 1 did and so the original FID and the evaluation of ADM
            (arXiv:2105.05233); (x - 128) / 128.

    Raises:
        ValueError: ``resize`` is another.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize={resize!r} is unknown: one of {', '.join(RESIZES)}")
    x = jnp.asarray(images, jnp.float32)
    shapes.check("images", x, b=None, h=None, w=None, c={1, 3})
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    if resize == "pytorch-fid":
        x = 2 * _resized(_resized(x / 255, 1, centred=True), 2, centred=True) - 1
    else:
        x = (_resized(_resized(x, 1, centred=False), 2, centred=False) - 128) / 128
    return x


def _resized(x: Float[Array, "b _ _ c"], axis: int, *, centred: bool) -> Float[Array, "b _ _ c"]:
    """Returns ``x`` with SIZE entries along ``axis``, each between two neighbours of the input."""
    length = x.shape[axis]
    at = np.arange(SIZE) * (length / SIZE)
    if centred:
        at = np.maximum((np.arange(SIZE) + 0.5) * (length / SIZE) - 0.5, 0)
    low = np.floor(at).astype(np.int32)
    high = np.minimum(low + 1, length - 1)
    part = np.expand_dims((at - low).astype(np.float32), tuple(i for i in range(4) if i != axis))
    below, above = jnp.take(x, low, axis), jnp.take(x, high, axis)
    return below + (above - below) * part


Grid = Float[Array, "b h w c"]  # features of a layer


class ConvReLU(nn.Module):
    """Convolution with a bias and ReLU."""

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Grid) -> Grid:
        """Returns [b, h', w', features]."""
        conv = nn.Conv(
            self.features,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )
        return nn.relu(conv(x))


def _conv(x: Grid, name: str, features: int, height: int, width: int) -> Grid:
    return ConvReLU(features, (height, width), name=name)(x)


def _conv_halving(x: Grid, name: str, features: int) -> Grid:
    return ConvReLU(features, (3, 3), strides=2, padding="VALID", name=name)(x)


def _max_halving(x: Grid) -> Grid:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def _average(x: Grid) -> Grid:
    """Means over 3x3 pixels; at the edges over those that are there."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _maximum(x: Grid) -> Grid:
    return nn.max_pool(x, (3, 3), padding="SAME")


class MixedA(nn.Module):
    """Branches of 1x1, 5x5 and twice 3x3 (Mixed_5b to 5d)."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Grid) -> Grid:
        """Returns the branches' outputs, channels side by side."""
        y5 = _conv(_conv(x, "branch5x5_1", 48, 1, 1), "branch5x5_2", 64, 5, 5)
        y3 = _conv(_conv(x, "branch3x3dbl_1", 64, 1, 1), "branch3x3dbl_2", 96, 3, 3)
        y3 = _conv(y3, "branch3x3dbl_3", 96, 3, 3)
        pool = _conv(_average(x), "branch_pool", self.pool_features, 1, 1)
        return jnp.concatenate([_conv(x, "branch1x1", 64, 1, 1), y5, y3, pool], -1)


class MixedB(nn.Module):
    """Branches that halve the grid, from 35x35 to 17x17 (Mixed_6a)."""

    @nn.compact
    def __call__(self, x: Grid) -> Grid:
        """Returns the branches' outputs, channels side by side."""
        y = _conv(_conv(x, "branch3x3dbl_1", 64, 1, 1), "branch3x3dbl_2", 96, 3, 3)
        y = _conv_halving(y, "branch3x3dbl_3", 96)
        return jnp.concatenate([_conv_halving(x, "branch3x3", 384), y, _max_halving(x)], -1)


class MixedC(nn.Module):
    """Branches of 1x1 and of factorised 7x7 (Mixed_6b to 6e)."""

    width: int

    @nn.compact
    def __call__(self, x: Grid) -> tuple[Float[Array, "b h w 768"], Float[Array, "b h w 192"]]:
        """Returns the output, and that of the 1x1 branch alone."""
        n = self.width
        y1 = _conv(x, "branch1x1", 192, 1, 1)
        y7 = _conv(_conv(x, "branch7x7_1", n, 1, 1), "branch7x7_2", n, 1, 7)
        y7 = _conv(y7, "branch7x7_3", 192, 7, 1)
        double = _conv(_conv(x, "branch7x7dbl_1", n, 1, 1), "branch7x7dbl_2", n, 7, 1)
        double = _conv(_conv(double, "branch7x7dbl_3", n, 1, 7), "branch7x7dbl_4", n, 7, 1)
        double = _conv(double, "branch7x7dbl_5", 192, 1, 7)
        pool = _conv(_average(x), "branch_pool", 192, 1, 1)
        return jnp.concatenate([y1, y7, double, pool], -1), y1


class MixedD(nn.Module):
    """Branches that halve the grid, from 17x17 to 8x8 (Mixed_7a)."""

    @nn.compact
    def __call__(self, x: Grid) -> Grid:
        """Returns the branches' outputs, channels side by side."""
        y3 = _conv_halving(_conv(x, "branch3x3_1", 192, 1, 1), "branch3x3_2", 320)
        y7 = _conv(_conv(x, "branch7x7x3_1", 192, 1, 1), "branch7x7x3_2", 192, 1, 7)
        y7 = _conv_halving(_conv(y7, "branch7x7x3_3", 192, 7, 1), "branch7x7x3_4", 192)
        return jnp.concatenate([y3, y7, _max_halving(x)], -1)


class MixedE(nn.Module):
    """Branches that fork into 1x3 and 3x1 (Mixed_7b, 7c)."""

    pool: Callable[[Grid], Grid]

    @nn.compact
    def __call__(self, x: Grid) -> Grid:
        """Returns the branches' outputs, channels side by side."""
        y3 = _conv(x, "branch3x3_1", 384, 1, 1)
        double = _conv(_conv(x, "branch3x3dbl_1", 448, 1, 1), "branch3x3dbl_2", 384, 3, 3)
        branches = [
            _conv(x, "branch1x1", 320, 1, 1),
            _conv(y3, "branch3x3_2a", 384, 1, 3),
            _conv(y3, "branch3x3_2b", 384, 3, 1),
            _conv(double, "branch3x3dbl_3a", 384, 1, 3),
            _conv(double, "branch3x3dbl_3b", 384, 3, 1),
            _conv(self.pool(x), "branch_pool", 192, 1, 1),
        ]
        return jnp.concatenate(branches, -1)


class Inception(nn.Module):
    """The network, from images of ``preprocess`` to all features that measures are made of."""

    @nn.compact
    def __call__(self, images: Float[Array, "b 299 299 3"]) -> dict[str, Float[Array, "b ..."]]:
        """Returns float32 arrays by name.

        pool [b, 2048]: means of the last block, for FID.
        spatial [b, 2023]: for sFID, of the 1x1 branch of Mixed_6d ("mixed_6/conv:0" in the graph)
            the first 7 channels at all 17x17 places, flattened in the order row, column, channel,
            as in ADM's evaluation.
        probabilities [b, 1008]: of classes, for the Inception score, by the last layer's weights
            without its bias, as in ADM's evaluation and before it in that of the original score.
        block0 [b, 73, 73, 64], block1 [b, 35, 35, 192], block2 [b, 17, 17, 768]: after the first
            and the second max pool and after Mixed_6e.
        """
        shapes.check("images", images, b=None, h=SIZE, w=SIZE, c=3)
        found = {}
        x = _conv_halving(images, "Conv2d_1a_3x3", 32)
        x = ConvReLU(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = found["block0"] = _max_halving(_conv(x, "Conv2d_2b_3x3", 64, 3, 3))
        x = _conv(x, "Conv2d_3b_1x1", 80, 1, 1)
        x = ConvReLU(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = found["block1"] = _max_halving(x)
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = MixedA(pool_features, name=name)(x)
        x = MixedB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160)):
            x, _ = MixedC(width, name=name)(x)
        x, spatial = MixedC(160, name="Mixed_6d")(x)
        found["spatial"] = spatial[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x, _ = MixedC(192, name="Mixed_6e")(x)
        found["block2"] = x
        x = MixedE(_average, name="Mixed_7b")(MixedD(name="Mixed_7a")(x))
        x = MixedE(_maximum, name="Mixed_7c")(x)
        pool = found["pool"] = x.mean((1, 2))
        precision = jax.lax.Precision.HIGHEST
        logits = nn.Dense(NUM_CLASSES, use_bias=False, precision=precision, name="fc")(pool)
        found["probabilities"] = nn.softmax(logits)
        return found
