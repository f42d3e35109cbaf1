"""Layers that the transformers share (paper Section 4; the reference's ``models``).

On a mesh that is current (``jax.set_mesh``) they ask for the layout of their activations: the batch
divided over the axes "data" and "fsdp", heads and hidden units over "tensor". Without one they are
plain functions.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Shaped

xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal(stddev=0.02)

# The reference embeds with LN eps 1e-6 and normalises in the head with eps 1e-5.
BLOCK_EPS = 1e-6
HEAD_EPS = 1e-5

GATES = np.array([-4, -1])  # among the modulation vectors of a layer, see ``blocks.Block``

BATCH = ("data", "fsdp")  # mesh axes that the batch is divided over


def constrain(x: Shaped[Array, "..."], *axes: str | tuple[str, ...] | None) -> Shaped[Array, "..."]:
    """Lays ``x`` out over the current mesh; without a mesh it stays as it is.

    Args:
        x: any array.
        axes: for each dimension ``BATCH``, the name of a mesh axis, or None for undivided. Axes
            that the mesh lacks, or whose size does not divide the dimension, count as None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec: list[tuple[str, ...] | None] = []
    for size, entry in zip(x.shape, axes, strict=True):
        wanted = (entry,) if isinstance(entry, str) else entry or ()
        names = tuple(name for name in wanted if name in mesh.axis_names)
        fits = names and size % math.prod(mesh.shape[name] for name in names) == 0
        spec.append(names if fits else None)
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))


def normalize(x: Float[Array, "*b d"], eps: float = BLOCK_EPS) -> Float[Array, "*b d"]:
    """Layer norm without affine over the last axis: float32, whatever the dtype of ``x``."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(
    x: Float[Array, "*b in"],
    kernel: Float[Array, "in *out"],
    bias: Float[Array, "*out"],
    axes: tuple[str | None, ...],
) -> Float[Array, "..."]:
    """Returns ``x @ kernel + bias`` in ``x``'s dtype; gradients of kernel and bias are float32.

    Left to differentiation, the gradient of a bfloat16 product is rounded to bfloat16 before the
    devices sum their shares of it. The kernel is cast before it is gathered from the devices that
    keep its parts, and gathered anew for the backward pass.

    Args:
        x: of any float dtype.
        kernel, bias: float32.
        axes: static, the mesh axis of each dimension of the kernel in this product; along the
            first without one, parts of it may be kept by the devices of the axis "fsdp".
    """
    return jnp.tensordot(x, _gathered(kernel, x.dtype, axes), axes=1) + bias.astype(x.dtype)


def _gathered(
    kernel: Float[Array, "in *out"], dtype: DTypeLike, axes: tuple[str | None, ...]
) -> Float[Array, "in *out"]:
    """Returns the kernel in the dtype and layout of the product, cast where its parts are kept."""
    stored = list(axes)
    stored[stored.index(None)] = "fsdp"
    return constrain(constrain(kernel.astype(dtype), *stored), *axes)


def _linear_forward(
    x: Float[Array, "*b in"],
    kernel: Float[Array, "in *out"],
    bias: Float[Array, "*out"],
    axes: tuple[str | None, ...],
) -> tuple[Float[Array, "..."], tuple[Float[Array, "*b in"], Float[Array, "in *out"]]]:
    return linear(x, kernel, bias, axes), (x, kernel)


def _linear_backward(
    axes: tuple[str | None, ...],
    residuals: tuple[Float[Array, "*b in"], Float[Array, "in *out"]],
    dy: Float[Array, "..."],
) -> tuple[Float[Array, "*b in"], Float[Array, "in *out"], Float[Array, "*out"]]:
    x, kernel = residuals
    outputs = tuple(range(x.ndim - 1, dy.ndim))
    rows = tuple(range(x.ndim - 1))
    gathered = _gathered(kernel, x.dtype, axes)
    dx = jnp.tensordot(dy, gathered, axes=(outputs, tuple(range(1, kernel.ndim))))
    dkernel = jnp.tensordot(x, dy, axes=(rows, rows), preferred_element_type=jnp.float32)
    return dx, dkernel, dy.sum(rows, dtype=jnp.float32)


linear.defvjp(_linear_forward, _linear_backward)


class Dense(nn.Module):
    """A dense layer with kernel [i, *features], initially Xavier uniform, and bias, zeros.

    Attributes:
        features: sizes of the output's last axes; with several the kernel is initialised as the
            packed matrix [i, product of features].
        dtype: of the product and the output.
        axes: of the mesh, one for each dimension of the kernel; see ``linear``.
    """

    features: tuple[int, ...]
    dtype: DTypeLike
    axes: tuple[str | None, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "..."]:
        """Returns ``x @ kernel + bias``, [*b, *features]."""
        shape = (x.shape[-1], math.prod(self.features))
        init = lambda key: xavier(key, shape).reshape(shape[0], *self.features)  # noqa: E731
        kernel = self.param("kernel", init)
        bias = self.param("bias", nn.initializers.zeros, self.features)
        y = linear(x.astype(self.dtype), jnp.asarray(kernel), jnp.asarray(bias), self.axes)
        return checkpoint_name(y, "dense")


def sincos_2d(num_tokens: int, width: int) -> Float[Array, "l d"]:
    """Returns the 2-D sine-cosine position table of a square grid, float32.

    Half of the channels encode the row, half the column, with wavelengths from 2 pi tokens to the
    grid's side times that; a width that is not divisible by four is padded with zeros.

    Raises:
        ValueError: ``num_tokens`` is not a square.
    """
    side = round(num_tokens**0.5)
    if side * side != num_tokens:
        raise ValueError(f"{num_tokens=} is not a square: sine-cosine positions need a square grid")
    frequencies = float(side) ** -(jnp.arange(width // 4) / max(width // 4, 1))
    row, column = jnp.divmod(jnp.arange(num_tokens), side)
    angles = [axis[:, None] * frequencies for axis in (row, column)]
    table = jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], axis=-1)
    return jnp.pad(table, ((0, 0), (0, width - table.shape[-1])))


class LayerNorm(nn.Module):
    """Layer norm with affine, statistics in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Returns the normalised ``x`` in its dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (normalize(x, self.eps) * scale + bias).astype(x.dtype)


class Mlp(nn.Module):
    """Two dense layers, d -> ratio * d -> d, with tanh-GELU between them."""

    ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Returns the output of the second layer in ``dtype``."""
        width = x.shape[-1]
        x = Dense((self.ratio * width,), self.dtype, (None, "tensor"), name="up")(x)
        x = jax.nn.gelu(constrain(x, BATCH, None, "tensor"), approximate=True)
        return Dense((width,), self.dtype, ("tensor", None), name="down")(x)


class TokenEmbedding(nn.Module):
    """``LN(word[id] + position[raster position])``, then dropout.

    Attributes:
        num_tokens: l; codebook_size: v; width: d.
        dropout: rate.
        position_init: "normal" (N(0, 0.02), the paper) or "sincos" (2-D sine-cosine), which lets a
            small model use context from the start.
        word_std: initial standard deviation of the word table; it is the scale of the first logits
            too, because the head ties it.
        dtype: of the output.
    """

    num_tokens: int
    codebook_size: int
    width: int
    dropout: float
    position_init: str
    word_std: float
    dtype: DTypeLike

    def setup(self) -> None:
        # One row more than codes: the last is [MASK].
        init = nn.initializers.normal(stddev=self.word_std)
        self.word = self.param("word", init, (self.codebook_size + 1, self.width))
        shape = (self.num_tokens, self.width)
        if self.position_init == "sincos":
            self.position = self.param("position", lambda key: sincos_2d(*shape))
        elif self.position_init == "normal":
            self.position = self.param("position", normal, shape)
        else:
            raise ValueError(f"{self.position_init=} is neither 'normal' nor 'sincos'")
        self.norm = LayerNorm(BLOCK_EPS)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self,
        tokens: Int[Array, "b n"] | Float[Array, "b n d"],
        positions: Int[Array, "b n"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "b n d"]:
        """Embeds ids in 0..v, where v is [MASK], at raster ``positions``.

        Floats are embedded already: they are cast, and ``positions`` may be None.
        """
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return constrain(jnp.asarray(tokens, self.dtype), BATCH, None, None)
        # Whole tables on every device: looking up in divided ones costs far more than they hold.
        word, position = (constrain(jnp.asarray(x), None, None) for x in (self.word, self.position))
        x = self.norm(word[tokens] + position[positions])
        x = self.drop(x, deterministic=deterministic).astype(self.dtype)
        return constrain(x, BATCH, None, None)


class Head(nn.Module):
    """Features to logits: LN, dense, exact GELU, LN, times the transposed word table, + bias."""

    codebook_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b m d"], word: Float[Array, "v+1 d"]
    ) -> Float[Array, "b m v"]:
        """Returns float32 logits of the codes; ``word`` is the table of the embedding."""
        x = LayerNorm(HEAD_EPS, name="norm_in")(x)
        x = Dense((x.shape[-1],), self.dtype, (None, None), name="dense")(x)
        x = LayerNorm(HEAD_EPS, name="norm_out")(jax.nn.gelu(x, approximate=False))
        # Kept from the reference: the tied table gets no gradient through the head, and the bias
        # has a row for [MASK] although only the codes are ever predicted.
        bias = self.param("bias", nn.initializers.zeros, (self.codebook_size + 1,))
        codes = constrain(jax.lax.stop_gradient(jnp.asarray(word)).astype(self.dtype), None, None)
        codes = codes[: self.codebook_size]
        logits = jnp.einsum("bmd,vd->bmv", x, codes, preferred_element_type=jnp.float32)
        return constrain(logits + bias[: self.codebook_size], BATCH, None, None)


class Modulation(nn.Module):
    """Class labels to the modulation vectors of all layers: ``SiLU(c) @ W + b``.

    Attributes:
        num_classes: the label ``num_classes``, the last row of the table, means "no class".
        num_layers: of all stacks of the model together.
        num_vectors: of a layer, see ``blocks.Block``.
        width: d.
        gate_bias: initial bias of the gates; 0, as in the paper, makes every block start as the
            identity.
        dtype: of the vectors.
    """

    num_classes: int
    num_layers: int
    num_vectors: int
    width: int
    gate_bias: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, labels: Int[Array, " b"], num_layers: int | None = None
    ) -> Float[Array, "layers b vectors d"]:
        """Returns the vectors of the first ``num_layers`` layers; None: of all."""
        table = self.param("label_table", normal, (self.num_classes + 1, self.width))
        size = self.num_vectors * self.width
        kernel = self.param("kernel", nn.initializers.zeros, (self.num_layers, self.width, size))
        bias = self.param("bias", self._init_bias, (self.num_layers, size))
        c = jax.nn.silu(constrain(jnp.asarray(table), None, None)[labels]).astype(self.dtype)
        # Layer by layer: a kernel that is divided over devices is never whole on any of them.
        layer = lambda _, parameters: (None, linear(c, *parameters, (None, "tensor")))  # noqa: E731
        parameters = [jnp.asarray(x)[:num_layers] for x in (kernel, bias)]
        _, vectors = jax.lax.scan(layer, None, parameters)
        vectors = vectors.reshape(*vectors.shape[:2], self.num_vectors, self.width)
        return constrain(vectors, None, BATCH, None, None)

    def _init_bias(self, key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "layers out"]:
        bias = jnp.zeros((self.num_layers, self.num_vectors, self.width))
        return bias.at[:, GATES].set(self.gate_bias).reshape(shape)


class ConstantModulation(nn.Module):
    """The modulation vectors of a model without class labels: learned, the same for every image.

    They are offsets from a plain pre-norm block, whose shifts and scales are 0 and gates 1, so that
    weight decay draws the block there and not to one that does nothing.

    Attributes:
        num_layers, num_vectors, width, dtype: as of ``Modulation``.
        gate_bias: initial offset of the gates; -0.7 lets blocks add less to their input at first.
    """

    num_layers: int
    num_vectors: int
    width: int
    gate_bias: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, labels: Int[Array, " b"], num_layers: int | None = None
    ) -> Float[Array, "layers b vectors d"]:
        """Returns the vectors of the first ``num_layers`` layers; ``labels`` only count images."""
        shape = (self.num_layers, self.num_vectors, self.width)
        init = lambda key: jnp.zeros(shape).at[:, GATES].set(self.gate_bias)  # noqa: E731
        constants = jnp.asarray(self.param("constants", init))
        gates = jnp.zeros((self.num_vectors, 1)).at[GATES].set(1.0)
        vectors = (constants + gates).astype(self.dtype)[:num_layers, None]
        of_each = (vectors.shape[0], labels.shape[0], *vectors.shape[2:])
        return constrain(jnp.broadcast_to(vectors, of_each), None, BATCH, None, None)


class TextEmbedding(nn.Module):
    """Text to the width of the transformer: states of an encoder, or words of a learned table.

    Attributes:
        width: d.
        vocabulary: words of the table, of N(0, 0.02) at first, which are normalised with their
            positions as codes of the image are; None: the text is states of an encoder, which go
            through a dense layer.
        num_positions: longest text, of learned positions, N(0, 0.02) at first, that are added;
            None: no positions.
        dtype: of the output.
    """

    width: int
    vocabulary: int | None
    num_positions: int | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, text: Int[Array, "b p"] | Float[Array, "b p e"]) -> Float[Array, "b p d"]:
        """Embeds words, 0 <= word < ``vocabulary``, or states."""
        if self.vocabulary is None:
            x = Dense((self.width,), self.dtype, (None, None), name="dense")(text)
        else:
            table = jnp.asarray(self.param("word", normal, (self.vocabulary, self.width)))
            x = constrain(table, None, None)[text].astype(self.dtype)
        if self.num_positions is not None:
            shape = (self.num_positions, self.width)
            position = jnp.asarray(self.param("position", normal, shape))
            x = x + position[: text.shape[1]].astype(self.dtype)
        if self.vocabulary is not None:
            # Blocks add to their input: next to what they add, words of 0.02 would be lost.
            x = LayerNorm(BLOCK_EPS, name="norm")(x)
        return constrain(x, BATCH, None, None)
