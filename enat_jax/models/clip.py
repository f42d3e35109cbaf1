"""CLIP (arXiv:2103.00020): texts to states and vectors, pictures to vectors of the same space.

Its weights stay as they are: a transformer is conditioned on the states of a text, and pictures are
compared with their prompts by the two vectors. Both towers are one stack of pre-norm blocks, which
are laid out over a mesh as those of a transformer are, see ``layers``.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from enat_jax.models.layers import BATCH, Dense, constrain

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's weights
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # most of OpenCLIP's
}
EPS = 1e-5


class Block(nn.Module):
    """A pre-norm block.

    Attributes:
        num_heads: h.
        hidden: width of the MLP's hidden layer.
        activation: a key of ``ACTIVATIONS``.
        causal: whether a token looks at those before it alone.
        dtype: of the computation; norms' statistics and the softmax are float32.
    """

    num_heads: int
    hidden: int
    activation: str
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], None]:
        """Runs the block; the signature suits ``nn.scan``."""
        width = x.shape[-1]
        norm = lambda name: nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name=name)  # noqa: E731
        # In and out of a pair of products the mesh axis "tensor" alternates.
        first = lambda size, name: Dense((size,), self.dtype, (None, "tensor"), name=name)  # noqa: E731
        second = lambda name: Dense((width,), self.dtype, ("tensor", None), name=name)  # noqa: E731
        y = norm("norm1")(x)
        heads = (*y.shape[:2], self.num_heads, width // self.num_heads)
        query, key, value = (
            constrain(first(width, name)(y).reshape(heads), BATCH, None, "tensor", None)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        x = constrain(x + second("out")(y.reshape(x.shape)), BATCH, None, None)
        y = ACTIVATIONS[self.activation](first(self.hidden, "up")(norm("norm2")(x)))
        return constrain(x + second("down")(y), BATCH, None, None), None


def _stack(model: "TextTower | VisionTower", causal: bool, name: str | None = None) -> Block:
    """Makes the blocks of a tower, with parameters stacked on axis 0."""
    return nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=model.num_layers
    )(model.num_heads, model.hidden, model.activation, causal, jnp.dtype(model.dtype), name=name)


def _check(model: "TextTower | VisionTower") -> None:
    if model.activation not in ACTIVATIONS:
        known = tuple(ACTIVATIONS)
        raise ValueError(f"activation={model.activation!r} is unknown: one of {known}")
    if model.width % model.num_heads:
        raise ValueError(f"width={model.width} is not divisible by num_heads={model.num_heads}")


class TextTower(nn.Module):
    """The text tower.

    Attributes:
        vocabulary: tokens; the largest one ends a text.
        context: p, tokens of a text with its first, its last and its padding.
        width: e.
        num_layers: of the blocks that are run.
        num_heads: 64 channels each in all published models.
        hidden: width of the MLPs' hidden layer.
        activation: a key of ``ACTIVATIONS``; the weights do not say it.
        projection: width of the vector of a text; None: the tower gives states alone.
        final_norm: whether the states are normalised at the end; without, and with one layer less
            than there is, they are the input of the last layer, which some models are
            conditioned on.
        dtype: of the computation.
    """

    vocabulary: int
    context: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    activation: str
    projection: int | None = None
    final_norm: bool = True
    dtype: str = "float32"

    def setup(self) -> None:
        _check(self)
        init = nn.initializers.normal(0.02)
        self.token = self.param("token", init, (self.vocabulary, self.width))
        self.position = self.param("position", init, (self.context, self.width))
        self.blocks = _stack(self, causal=True)
        if self.final_norm:
            self.norm = nn.LayerNorm(epsilon=EPS, dtype=jnp.dtype(self.dtype))
        if self.projection is not None:
            self.project = nn.Dense(self.projection, use_bias=False, dtype=jnp.dtype(self.dtype))

    def __call__(
        self, ids: Int[Array, "b p"]
    ) -> tuple[Float[Array, "b p e"], Float[Array, "b proj"] | None]:
        """Returns the states of texts and, if there is a projection, their vectors.

        Up to the end of a text its states do not depend on what follows, because no token looks
        ahead; behind it they depend on the text and on the padding.

        Args:
            ids: of at most ``context`` tokens. The first of the largest ids is the end of a text.
        """
        token, position = (
            constrain(jnp.asarray(x), None, None) for x in (self.token, self.position)
        )
        x = (token[ids] + position[: ids.shape[1]]).astype(self.dtype)
        x, _ = self.blocks(constrain(x, BATCH, None, None))
        if self.final_norm:
            x = self.norm(x)
        if self.projection is None:
            return x, None
        end = jnp.argmax(ids, axis=1)
        return x, self.project(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])


class VisionTower(nn.Module):
    """The vision tower.

    Attributes:
        image_size: pixels of a side.
        patch_size: pixels of a side of a patch, each of which is a token.
        width, num_layers, num_heads, hidden, activation, projection, dtype: as of ``TextTower``.
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    activation: str
    projection: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b proj"]:
        """Returns the vectors of pictures, which are normalised by CLIP's mean and deviation."""
        _check(self)
        dtype = jnp.dtype(self.dtype)
        init = nn.initializers.normal(0.02)
        norm = lambda name: nn.LayerNorm(epsilon=EPS, dtype=dtype, name=name)  # noqa: E731
        patch = (self.patch_size,) * 2
        x = nn.Conv(self.width, patch, patch, "VALID", use_bias=False, dtype=dtype, name="patches")(
            images.astype(dtype)
        )
        x = x.reshape(x.shape[0], -1, self.width)
        first = jnp.asarray(self.param("class", init, (self.width,)), dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), x], axis=1)
        places = ((self.image_size // self.patch_size) ** 2 + 1, self.width)
        x = x + jnp.asarray(self.param("position", init, places), dtype)
        x, _ = _stack(self, causal=False, name="blocks")(norm("norm_in")(x))
        vector = norm("norm")(x[:, 0])
        return nn.Dense(self.projection, use_bias=False, dtype=dtype, name="project")(vector)
