"""Discriminators: networks that learn to tell pictures from a tokenizer's reconstructions.

The one to use is ``Discriminator``, that of VQGAN+ (MaskBit, arXiv:2409.16211). It looks at patches
and takes pictures of any size. ``StyleGANDiscriminator`` is that of MaskGIT (arXiv:2202.04200) and
MAGVIT, for comparisons: it judges a whole picture, so it is made for one size, and it needs the
gradient penalty. Parameters and logits are float32; images lie in [0, 1] and are not rescaled.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from enat_jax.models import shapes

KINDS = ("vqgan_plus", "stylegan")
CELLS = 16  # cells of logits along one side, at most
_SLOPE = 0.1  # of the leaky ReLUs of VQGAN+
_STYLEGAN_SLOPE = 0.2
_STYLEGAN_SIDE = 4  # of the last grid of StyleGAN's discriminator, in cells

Grid = Float[Array, "b h w c"]


def blur(x: Grid) -> Float[Array, "b h/2 w/2 c"]:
    """Halves height and width after smoothing with outer([1, 3, 3, 1]) / 64 (arXiv:1904.11486).

    There is one row or column of zeros on each side; of an odd size the last place is left out. The
    filter is a sum of strided slices: the gradient of the same depthwise convolution is many times
    slower on a CPU.
    """
    for axis in (1, 2):
        half = x.shape[axis] // 2
        padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(4)])
        a, b, c, d = (
            jax.lax.slice_in_dim(padded, start, start + 2 * half - 1, stride=2, axis=axis)
            for start in range(4)
        )
        x = (a + 3 * b + 3 * c + d) / 8
    return x


class Stage(nn.Module):
    """A convolution, the blur that halves the grid, a group norm and a leaky ReLU."""

    channels: int
    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Grid) -> Float[Array, "b h/2 w/2 channels"]:
        """Returns features in ``dtype``."""
        x = blur(_conv(x, self.channels, 3, "conv", self.dtype))
        # E[x^2] - E[x]^2, the faster variance, loses digits where the mean is large.
        norm = nn.GroupNorm(
            self.groups, epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name="norm"
        )
        return nn.leaky_relu(norm(x), _SLOPE)


class Discriminator(nn.Module):
    """The discriminator of VQGAN+ (arXiv:2409.16211, as in its released code).

    Pictures of 256 pixels take 128 channels and 4 stages, 7.43 M parameters; of 128 pixels 3
    stages; of 32 pixels 32 channels and 2 stages, 36 k parameters.

    Attributes:
        channels: of the first stage; each further one doubles them. The tokenizer's ``channels``
            serve best: both together brought the released recipe from 7.15 to 4.02 rFID.
        stages: each halves the grid.
        groups: of the group norms. None: 4 channels of the first stage each, at most 32 groups; the
            released networks have 32 groups. Groups of one channel would hide a picture's contrast.
        dtype: of the convolutions but the last. Parameters, statistics of the norms and logits are
            float32.
    """

    channels: int = 128
    stages: int = 4
    groups: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w"]:
        """Returns a logit of each cell, float32, positive where it takes a picture for real.

        Args:
            images: in [0, 1]. h and w are H and W after ``stages`` halvings, and at most 16: larger
                grids are pooled to 16 cells by their maxima.

        Raises:
            ValueError: the images are smaller than ``2 ** stages`` pixels, or ``groups`` does not
                divide ``channels``.
        """
        shapes.check("images", images, b=None, H=None, W=None, c=None)
        height, width = images.shape[1:3]
        if min(height, width) < 2**self.stages:
            raise ValueError(
                f"images of {height}x{width} pixels are too small for a discriminator of "
                f"stages={self.stages}, each of which halves them: choose fewer stages"
            )
        x = nn.leaky_relu(_conv(images, self.channels, 5, "first", self.dtype), _SLOPE)
        for i in range(self.stages):
            stage = Stage(self.channels * 2**i, self._groups(), self.dtype, name=f"stage_{i}")
            x = stage(x)
        for axis in (1, 2):
            x = _pooled(x, axis)
        x = nn.leaky_relu(_conv(x, x.shape[-1], 1, "hidden", self.dtype), _SLOPE)
        return _conv(x, 1, 5, "logits", jnp.float32)[..., 0]

    def _groups(self) -> int:
        if self.groups is None:
            return math.gcd(self.channels, min(32, max(1, self.channels // 4)))
        if self.groups < 1 or self.channels % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide channels={self.channels} of the discriminator: "
                "choose others, or groups=None"
            )
        return self.groups


def _conv(x: Grid, features: int, size: int, name: str, dtype: DTypeLike) -> Grid:
    """Applies a convolution with zero padding that is initialised as PyTorch does by default."""
    limit = 1 / math.sqrt(size * size * x.shape[-1])  # of kernel and bias alike

    def uniform(
        key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "..."]:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    conv = nn.Conv(
        features, (size, size), kernel_init=uniform, bias_init=uniform, dtype=dtype, name=name
    )
    return conv(x)


def _pooled(x: Grid, axis: int) -> Grid:
    """Returns the maxima of at most ``CELLS`` windows along an axis.

    Where the size is no multiple the windows overlap, as in PyTorch's ``AdaptiveMaxPool2d``.
    """
    size = x.shape[axis]
    if size <= CELLS:
        return x
    bounds = [(i * size // CELLS, -(-(i + 1) * size // CELLS)) for i in range(CELLS)]
    windows = [jax.lax.slice_in_dim(x, start, end, axis=axis) for start, end in bounds]
    return jnp.concatenate([window.max(axis, keepdims=True) for window in windows], axis)


class ResBlock(nn.Module):
    """A residual block of StyleGAN's discriminator that halves the grid (arXiv:1912.04958)."""

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Grid) -> Float[Array, "b h/2 w/2 channels"]:
        """Returns features in ``dtype``."""
        inner = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name="inner")
        outer = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="outer")
        skip = nn.Conv(self.channels, (1, 1), use_bias=False, dtype=self.dtype, name="skip")
        h = blur(nn.leaky_relu(inner(x), _STYLEGAN_SLOPE))
        h = nn.leaky_relu(outer(h), _STYLEGAN_SLOPE)
        return (h + skip(blur(x))) / math.sqrt(2)


class StyleGANDiscriminator(nn.Module):
    """The discriminator of MaskGIT and MAGVIT, for comparisons; ``Discriminator`` is better.

    Its recipes penalise its gradient at every step, which costs as much as the rest of its loss.

    Attributes:
        size: height and width of the pictures in pixels; no others can be judged.
        channels: of the first convolution, 64 in the released recipes.
        widths: channels of the blocks, each of which halves the grid.
        dtype: of the convolutions. Parameters, dense layers and logits are float32.
    """

    size: tuple[int, int]
    channels: int = 64
    widths: Sequence[int] = (128, 256, 512, 512, 512, 512)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b 1 1"]:
        """Returns a logit of each picture, float32, positive where it takes it for real.

        Args:
            images: in [0, 1].

        Raises:
            ValueError: the images are not of ``size``.
        """
        height, width = self.size
        shapes.check("images", images, b=None, H=height, W=width, c=None)
        x = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="first")(images)
        x = nn.leaky_relu(x, _STYLEGAN_SLOPE)
        for i, channels in enumerate(self.widths):
            x = ResBlock(channels, self.dtype, name=f"block_{i}")(x)
        x = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name="last")(x)
        x = nn.leaky_relu(x, _STYLEGAN_SLOPE).astype(jnp.float32)
        x = nn.Dense(x.shape[-1], name="hidden")(x.reshape(len(x), -1))
        x = nn.Dense(1, name="logits")(nn.leaky_relu(x, _STYLEGAN_SLOPE))
        return x[:, None]


def make(
    kind: str,
    size: tuple[int, int],
    *,
    channels: int,
    stages: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Discriminator | StyleGANDiscriminator:
    """Returns a discriminator of pictures of one size.

    Args:
        kind: one of ``KINDS``.
        size: height and width in pixels. Other sizes suit "vqgan_plus", too.
        channels: of the first convolution.
        stages: halvings of the grid. None: of "vqgan_plus" as many as leave 16 cells along the
            shorter side, 2 at least; of "stylegan" as many as leave 4.
        dtype: of the convolutions.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} of a discriminator is unknown: one of {', '.join(KINDS)}")
    side = min(size)
    if kind == "vqgan_plus":
        stages = max(2, _halvings(side, CELLS)) if stages is None else stages
        return Discriminator(channels, stages, dtype=dtype)
    stages = _halvings(side, _STYLEGAN_SIDE) if stages is None else stages
    widths = tuple(channels * min(8, 2 ** (i + 1)) for i in range(stages))
    return StyleGANDiscriminator(size, channels, widths, dtype)


def _halvings(side: int, cells: int) -> int:
    """Returns how often ``side`` can be halved with ``cells`` left at least."""
    return max(0, (side // cells).bit_length() - 1)
