"""Building blocks shared by the transformers (method: paper Section 4, reference ``models``).

On a mesh that is current (``jax.set_mesh``) they ask for the layout of their activations: the batch
divided over the axes "data" and "fsdp", heads and hidden units over "tensor". Without one they are
plain functions.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal(stddev=0.02)

# The reference embeds with LN eps 1e-6 and normalises in the head with eps 1e-5.
BLOCK_EPS = 1e-6
HEAD_EPS = 1e-5


BATCH = ("data", "fsdp")  # mesh axes that the batch is divided over


def constrain(x, *axes):
    """``x``, laid out over the current mesh; itself without a mesh.

    Args:
        x: array.
        axes: for each dimension ``BATCH``, the name of a mesh axis, or None for undivided. Axes
            that the mesh lacks, or whose size does not divide the dimension, count as None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = []
    for size, entry in zip(x.shape, axes, strict=True):
        names = [entry] if isinstance(entry, str) else list(entry or ())
        names = tuple(name for name in names if name in mesh.axis_names)
        fits = names and size % math.prod(mesh.shape[name] for name in names) == 0
        spec.append(names if fits else None)
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))


def normalize(x, eps=BLOCK_EPS):
    """Layer norm without affine over the last axis: float32, whatever the dtype of ``x``."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(x, kernel, bias, axes):
    """``x @ kernel + bias`` in ``x``'s dtype, with float32 gradients of kernel and bias.

    Left to differentiation, the gradient of a bfloat16 product is rounded to bfloat16 before the
    devices sum their shares of it. The kernel is cast before it is gathered from the devices that
    keep its parts, and gathered anew for the backward pass.

    Args:
        x: [..., i]; kernel: float32 [i, *o]; bias: float32 [*o].
        axes: static, the mesh axis of each dimension of the kernel in this product; along the
            first without one, parts of it may be kept by the devices of the axis "fsdp".

    Returns:
        [..., *o].
    """
    return jnp.tensordot(x, _gathered(kernel, x.dtype, axes), axes=1) + bias.astype(x.dtype)


def _gathered(kernel, dtype, axes):
    """The kernel in the dtype and layout of the computation, cast where its parts are kept."""
    stored = list(axes)
    stored[stored.index(None)] = "fsdp"
    return constrain(constrain(kernel.astype(dtype), *stored), *axes)


def _linear_forward(x, kernel, bias, axes):
    return linear(x, kernel, bias, axes), (x, kernel)


def _linear_backward(axes, residuals, dy):
    x, kernel = residuals
    outputs = tuple(range(x.ndim - 1, dy.ndim))
    rows = tuple(range(x.ndim - 1))
    gathered = _gathered(kernel, x.dtype, axes)
    dx = jnp.tensordot(dy, gathered, axes=(outputs, tuple(range(1, kernel.ndim))))
    dkernel = jnp.tensordot(x, dy, axes=(rows, rows), preferred_element_type=jnp.float32)
    return dx, dkernel, dy.sum(rows, dtype=jnp.float32)


linear.defvjp(_linear_forward, _linear_backward)


class Dense(nn.Module):
    """A dense layer, Xavier uniform and zeros; parameters "kernel" [i, *features] and "bias".

    Attributes:
        features: sizes of the output's last axes; with several the kernel is initialised as the
            packed matrix [i, product of features].
        axes: of the mesh, one for each dimension of the kernel; see ``linear``.
    """

    features: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]

    @nn.compact
    def __call__(self, x):
        """x [..., i]; returns [..., *features] in ``dtype``."""
        shape = (x.shape[-1], math.prod(self.features))
        init = lambda key: xavier(key, shape).reshape(shape[0], *self.features)  # noqa: E731
        kernel = self.param("kernel", init)
        bias = self.param("bias", nn.initializers.zeros, self.features)
        y = linear(x.astype(self.dtype), jnp.asarray(kernel), jnp.asarray(bias), self.axes)
        return checkpoint_name(y, "dense")


def sincos_2d(num_tokens, width):
    """2-D sine-cosine position table of a square grid, float32 [num_tokens, width].

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
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (normalize(x, self.eps) * scale + bias).astype(x.dtype)


class Mlp(nn.Module):
    """d -> ratio * d -> d with tanh-GELU."""

    ratio: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = Dense((self.ratio * width,), self.dtype, (None, "tensor"), name="up")(x)
        x = jax.nn.gelu(constrain(x, BATCH, None, "tensor"), approximate=True)
        return Dense((width,), self.dtype, ("tensor", None), name="down")(x)


class TokenEmbedding(nn.Module):
    """``LN(word[id] + position[raster position])``, then dropout.

    ``position_init`` is ``"normal"`` (N(0, 0.02), the paper) or ``"sincos"`` (2-D sine-cosine),
    which lets a small model use context from the start. ``word_std`` is the initial standard
    deviation of the word table; it is the scale of the first logits too, because the head ties it.
    """

    num_tokens: int
    codebook_size: int
    width: int
    dropout: float
    position_init: str
    word_std: float
    dtype: jnp.dtype

    def setup(self):
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

    def __call__(self, ids, positions, deterministic=True):
        """ids, positions: int32 [b, n] (ids in 0..v, v is [MASK]); returns [b, n, d]."""
        # Whole tables on every device: looking up in divided ones costs far more than they hold.
        word, position = (constrain(jnp.asarray(x), None, None) for x in (self.word, self.position))
        x = self.norm(word[ids] + position[positions])
        x = self.drop(x, deterministic=deterministic).astype(self.dtype)
        return constrain(x, BATCH, None, None)


class Head(nn.Module):
    """Features to logits: LN, dense, exact GELU, LN, times the transposed word table, + bias."""

    codebook_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, word):
        """x [b, m, d], word [v + 1, d]; returns float32 logits [b, m, v]."""
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

    The last row of the label table means "no class". ``gate_bias`` is the initial bias of the
    gates; 0, as in the paper, makes every block start as the identity.
    """

    num_classes: int
    num_layers: int
    num_vectors: int
    width: int
    gate_bias: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, labels, num_layers=None):
        """labels int32 [b], num_classes for no class; returns [layers, b, vectors, d].

        ``num_layers``: of the first layers only; None: of all.
        """
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

    def _init_bias(self, key, shape):
        bias = jnp.zeros((self.num_layers, self.num_vectors, self.width))
        gates = jnp.array([self.num_vectors - 4, self.num_vectors - 1])
        return bias.at[:, gates].set(self.gate_bias).reshape(shape)
