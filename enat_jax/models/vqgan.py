"""The MaskGIT VQGAN: images to a grid of codes and back (arXiv:2202.04200; the reference).

Sizes beside the dimension letters of the package: H, W image height and width; h, w those of the
grid, ``2 ** (len(channel_multipliers) - 1)`` times smaller; c image channels; d code width.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from enat_jax.models import quantizers, shapes


def _norm(module: "ResBlock | Encoder | Decoder", name: str) -> nn.GroupNorm:
    return nn.GroupNorm(module.num_groups, epsilon=1e-6, dtype=module.dtype, name=name)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual connection.

    Where the width changes the shortcut is applied to the block's output and not to its input, as
    in the released weights: ``shortcut(h) + h``.
    """

    channels: int
    num_groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w channels"]:
        """Runs the block."""

        def conv(size: int, name: str) -> nn.Conv:
            return nn.Conv(self.channels, (size, size), use_bias=False, dtype=self.dtype, name=name)

        h = conv(3, "conv1")(nn.silu(_norm(self, "norm1")(x)))
        h = conv(3, "conv2")(nn.silu(_norm(self, "norm2")(h)))
        if x.shape[-1] != self.channels:
            return conv(1, "shortcut")(h) + h
        return x + h


class Encoder(nn.Module):
    """Images to features; levels are separated by average pooling or convolutions of stride 2."""

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    embed_dim: int
    num_groups: int
    dtype: DTypeLike = jnp.float32
    conv_downsampling: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        """Returns the features in ``dtype``."""
        block = functools.partial(ResBlock, num_groups=self.num_groups, dtype=self.dtype)
        x = nn.Conv(self.channels, (3, 3), use_bias=False, dtype=self.dtype, name="conv_in")(images)
        for level, multiplier in enumerate(self.channel_multipliers):
            if level and self.conv_downsampling:
                # Sides are even, so that "SAME" adds one row and one column of zeros, at the end.
                strided = functools.partial(nn.Conv, strides=2, dtype=self.dtype)
                x = strided(x.shape[-1], (3, 3), name=f"downsample_{level - 1}")(x)
            elif level:
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            for i in range(self.num_res_blocks):
                x = block(self.channels * multiplier, name=f"down_{level}_{i}")(x)
        for i in range(2):
            x = block(x.shape[-1], name=f"mid_{i}")(x)
        x = nn.silu(_norm(self, "norm_out")(x))
        return nn.Conv(self.embed_dim, (1, 1), dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Code vectors to images, not clipped.

    Levels run from the deepest to the finest, number 0; each but the finest ends in a nearest
    neighbour enlargement and a convolution.
    """

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    image_channels: int
    num_groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w d"]) -> Float[Array, "b H W c"]:
        """Returns the images in ``dtype``."""
        block = functools.partial(ResBlock, num_groups=self.num_groups, dtype=self.dtype)
        x = nn.Conv(
            self.channels * self.channel_multipliers[-1], (3, 3), dtype=self.dtype, name="conv_in"
        )(z)
        for i in range(2):
            x = block(x.shape[-1], name=f"mid_{i}")(x)
        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            for i in range(self.num_res_blocks):
                x = block(self.channels * multiplier, name=f"up_{level}_{i}")(x)
            if level:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name=f"upsample_{level}")(x)
        x = nn.silu(_norm(self, "norm_out")(x))
        return nn.Conv(self.image_channels, (3, 3), dtype=self.dtype, name="conv_out")(x)


class VQGAN(nn.Module):
    """Encoder, quantizer and decoder; the defaults are the f16 tokenizer of 256x256 images.

    Attributes:
        channels: width of the finest level.
        channel_multipliers: width of each level, the finest first, in ``channels``.
        num_res_blocks: of a level.
        embed_dim: d, width of the encoder's output and of a code.
        codebook_size: v.
        num_groups: of the group norms; must divide the width of every level.
        image_channels: c.
        dtype: of the convolutions. Parameters, distances to the codes and outputs are float32.
        conv_downsampling: whether the encoder halves the sides by 3x3 convolutions of stride 2, as
            MaskBit's VQGAN+ (arXiv:2409.16211) does, rather than by average pooling.
        quantizer: "vq", "fsq" or "lfq", see ``quantizers``.
        normalize: whether features and codes of "vq" are unit vectors, for the decoder too.
        projection: whether the codes of "vq" are a frozen table times a learnt matrix.
        levels: of each feature of "fsq"; their product is v and their number d. "lfq" has two of
            each, and v is ``2 ** d``.
        gradient: "straight_through" or "rotation", see ``quantizers.passed``.
    """

    channels: int = 128
    channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    embed_dim: int = 256
    codebook_size: int = 1024
    num_groups: int = 32
    image_channels: int = 3
    dtype: str = "float32"
    conv_downsampling: bool = False
    quantizer: str = "vq"
    normalize: bool = False
    projection: bool = False
    levels: Sequence[int] = ()
    gradient: str = "straight_through"

    def __post_init__(self) -> None:
        names = ("codebook_size", "embed_dim", "normalize", "projection", "levels", "gradient")
        quantizers.check(self.quantizer, **{name: getattr(self, name) for name in names})
        super().__post_init__()

    @property
    def has_codebook(self) -> bool:
        """Whether every code is a parameter of its own, which may be moved."""
        return self.quantizer == "vq" and not self.projection

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def setup(self) -> None:
        widths = [self.channels * m for m in self.channel_multipliers]
        if any(width % self.num_groups for width in widths):
            raise ValueError(
                f"num_groups={self.num_groups} must divide the width of every level, {widths}: "
                "choose fewer groups or other channels"
            )
        shared: dict[str, Any] = {
            "channels": self.channels,
            "channel_multipliers": self.channel_multipliers,
            "num_res_blocks": self.num_res_blocks,
            "num_groups": self.num_groups,
            "dtype": self.dtype,
        }
        self.encoder = Encoder(
            embed_dim=self.embed_dim, conv_downsampling=self.conv_downsampling, **shared
        )
        self.decoder = Decoder(image_channels=self.image_channels, **shared)
        if self.quantizer != "vq":
            return
        init: Any = quantizers.unit_codes if self.normalize else quantizers.uniform_codes
        if self.projection:
            init = quantizers.frozen_codes
            square = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            width = (self.embed_dim, self.embed_dim)
            self.code_projection = self.param("code_projection", square, width, jnp.float32)
        self.codebook = self.param(
            "codebook", init, (self.codebook_size, self.embed_dim), jnp.float32
        )

    def encode(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        """Returns the features of images in [0, 1], float32.

        Raises:
            ValueError: H or W is no multiple of ``downsampling``, or c is not ``image_channels``.
        """
        shapes.check("images", images, b=None, H=None, W=None, c=None)
        _, height, width, channels = images.shape
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"images of {height}x{width} pixels cannot be cut into tokens of "
                f"{self.downsampling}x{self.downsampling}: resize or crop them to a multiple"
            )
        if channels != self.image_channels:
            raise ValueError(
                f"images have {channels} channels, the tokenizer takes {self.image_channels}"
            )
        return self.encoder(images).astype(jnp.float32)

    @property
    def _levels(self) -> tuple[int, ...]:
        return tuple(self.levels) or (2,) * self.embed_dim

    def code_table(self) -> Float[Array, "v d"]:
        """Returns the vectors of all codes, float32, as the decoder takes them."""
        if self.quantizer != "vq":
            ids = jnp.arange(self.codebook_size)
            return quantizers.of_digits(quantizers.from_ids(ids, self._levels), self._levels)
        # A numpy codebook, as an importer gives it, cannot be indexed by traced ids.
        table = jnp.asarray(self.codebook)
        if self.projection:
            matrix = self.code_projection.astype(jnp.float32)
            table = jnp.matmul(jax.lax.stop_gradient(table), matrix, precision="highest")
        return quantizers.unit(table.astype(jnp.float32)) if self.normalize else table

    def features(self, z: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Returns features of the encoder as they are compared with codes, float32."""
        shapes.check("z", z, b=None, h=None, w=None, d=self.embed_dim)
        z = z.astype(jnp.float32)
        if self.quantizer == "fsq":
            return quantizers.bounded(z, self.levels)
        return quantizers.unit(z) if self.normalize else z

    def quantize(
        self, z: Float[Array, "b h w d"]
    ) -> tuple[Int[Array, "b h w"], Float[Array, "b h w d"]]:
        """Returns the ids, int32, and the vectors, float32, of the codes nearest to features.

        Distances are squared; the first of equally near codes is taken. Gradients reach what is
        learnt of the codes through the vectors.
        """
        z = self.features(z)
        if self.quantizer != "vq":
            digits = quantizers.digits_of(z, self._levels)
            vectors = quantizers.of_digits(digits, self._levels)
            return quantizers.to_ids(digits, self._levels), vectors
        table = self.code_table()
        ids = quantizers.nearest(z, table)
        return ids, table[ids]

    def decode(self, codes: Float[Array, "b h w d"]) -> Float[Array, "b H W c"]:
        """Returns the images of code vectors, float32, about [0, 1], not clipped."""
        shapes.check("codes", codes, b=None, h=None, w=None, d=self.embed_dim)
        return self.decoder(codes).astype(jnp.float32)

    def decode_codes(self, ids: Int[Array, "b h w"]) -> Float[Array, "b H W c"]:
        """Returns the images of code ids, 0 <= id < v, as ``decode`` does."""
        shapes.check("ids", ids, b=None, h=None, w=None)
        return self.decode(self.code_table()[ids])

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Reconstructs images; touches every parameter, so initialise with it."""
        _, codes = self.quantize(self.encode(images))
        return self.decode(codes)


def count_codes(ids: Int[Array, "..."], codebook_size: int) -> Float[Array, " v"]:
    """Counts the places at which ``ids`` have each code, float32."""
    return jnp.zeros((codebook_size,), jnp.float32).at[ids.ravel()].add(1.0)


def code_statistics(
    counts: Shaped[Array | np.ndarray, " v"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the share of codes with any count, in [0, 1], and the perplexity, in [1, v]."""
    share = counts / counts.sum()
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0))
    used: Any = counts > 0  # of numpy where the counts are
    return used.mean(), jnp.exp(entropy)
