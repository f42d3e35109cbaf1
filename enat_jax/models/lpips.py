"""LPIPS, version 0.1 (arXiv:1801.03924): how different two pictures look, with VGG16 or AlexNet.

The networks are torchvision's, whose convolutions give the parameters their names: that of
``features.0`` is ``trunk/features_0``. Heads have the names of LPIPS' own files, ``lin0`` to
``lin4``. The weights come with ``evaluation/perceptual_weights.py``.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from enat_jax.models import shapes

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10  # that is added to the norms of features

Grid = Float[Array, "b h w c"]


class Block(NamedTuple):
    """Convolutions, each followed by ReLU, after the last of which features are compared.

    Attributes:
        layers: of each its number among torchvision's ``features``, and its channels.
        size: height and width of the kernels.
        stride: of the convolutions.
        pool: height and width of the max pool of stride 2 before them; 0 for none.
    """

    layers: tuple[tuple[int, int], ...]
    size: int = 3
    stride: int = 1
    pool: int = 0


VGG = (
    Block(((0, 64), (2, 64))),
    Block(((5, 128), (7, 128)), pool=2),
    Block(((10, 256), (12, 256), (14, 256)), pool=2),
    Block(((17, 512), (19, 512), (21, 512)), pool=2),
    Block(((24, 512), (26, 512), (28, 512)), pool=2),
)
ALEX = (
    Block(((0, 64),), size=11, stride=4),
    Block(((3, 192),), size=5, pool=3),
    Block(((6, 384),), pool=3),
    Block(((8, 256),)),
    Block(((10, 256),)),
)
TRUNKS = {"vgg": VGG, "alex": ALEX}
SMALLEST = {"vgg": 16, "alex": 31}  # pixels of the shorter side that the network needs


class Trunk(nn.Module):
    """VGG16 or AlexNet without their dense layers.

    Attributes:
        blocks: ``VGG`` or ``ALEX``.
        dtype: of the convolutions and of what they return.
    """

    blocks: tuple[Block, ...]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> list[Grid]:
        """Returns the features of each block.

        Args:
            images: shifted and scaled by ``SHIFT`` and ``SCALE``.
        """
        x, found = images, []
        for block in self.blocks:
            if block.pool:
                x = nn.max_pool(x, (block.pool, block.pool), strides=(2, 2))
            for number, channels in block.layers:
                conv = nn.Conv(
                    channels,
                    (block.size, block.size),
                    strides=block.stride,
                    padding=min(2, block.size // 2),
                    dtype=self.dtype,
                    precision=jax.lax.Precision.HIGHEST,
                    name=f"features_{number}",
                )
                x = nn.relu(conv(x))
            found.append(x)
        return found


class LPIPS(nn.Module):
    """The distance of LPIPS, a part for each block of the network.

    Attributes:
        network: a key of ``TRUNKS``.
        dtype: of the convolutions. Norms of features, their differences and sums are float32.
    """

    network: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b H W 3"], others: Float[Array, "b H W 3"]
    ) -> Float[Array, "layers b"]:
        """Returns what each block adds to the distances of pairs of pictures, float32.

        Args:
            images, others: in [0, 1].

        Raises:
            ValueError: the pictures are too small for the network, or of other shapes.
        """
        shapes.check("images", images, b=None, H=None, W=None, c=3)
        shapes.check("others", others, **dict(zip("bHWc", images.shape, strict=True)))
        if min(images.shape[1:3]) < SMALLEST[self.network]:
            raise ValueError(
                f"pictures of {images.shape[1]}x{images.shape[2]} pixels are too small for LPIPS "
                f"({self.network}), which needs {SMALLEST[self.network]}: enlarge them"
            )
        blocks = TRUNKS[self.network]
        trunk = Trunk(blocks, self.dtype, name="trunk")
        pairs = zip(trunk(_scaled(images)), trunk(_scaled(others)), strict=True)
        found = []
        for i, (a, b) in enumerate(pairs):
            head = self.param(f"lin{i}", nn.initializers.ones, (a.shape[-1],))
            # A fused multiply-add of division and subtraction would let equal features differ.
            same = (a == b).all(-1, keepdims=True)
            difference = jnp.where(same, 0.0, _unit(a) - _unit(b))
            difference = jnp.square(difference) * head.astype(jnp.float32)
            found.append(difference.sum(-1).mean((1, 2)))
        return jnp.stack(found)


def _scaled(images: Grid) -> Grid:
    return (2 * jnp.asarray(images, jnp.float32) - 1 - jnp.array(SHIFT)) / jnp.array(SCALE)


def _unit(features: Grid) -> Grid:
    """Returns features of length 1 at each place, float32; where all are 0 they stay 0.

    There the square root has no gradient, so it is not taken.
    """
    features = features.astype(jnp.float32)
    squares = jnp.square(features).sum(-1, keepdims=True)
    some = squares > 0
    norms = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0)
    return features / (norms + _EPSILON)
