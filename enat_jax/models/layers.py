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
ATTENTION = ("xla", "cudnn")
REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names("dense"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


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


def modulate(x, shift, scale):
    """``LN(x) * (1 + scale) + shift`` in ``x``'s dtype; x [b, n, d], shift and scale [b, d]."""
    return (normalize(x) * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


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


def attention(query, key, value, mask, implementation):
    """Multi-head attention, softmax in float32.

    Args:
        query: [b, q, h, k].
        key, value: [b, c, h, k].
        mask: bool, broadcastable to [b, h, q, c], True where a query may look; None: everywhere.
        implementation: "xla", anywhere; "cudnn": its fused kernels, on NVIDIA GPUs, bfloat16 and
            a head dimension divisible by 8.

    Returns:
        [b, q, h, k] in the dtype of ``value``.
    """
    if mask is not None:
        b, q, h, _ = query.shape
        mask = jnp.broadcast_to(mask, (mask.shape[0], mask.shape[1], q, key.shape[1]))
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


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


class Block(nn.Module):
    """Transformer block with adaptive layer norm, and context keys and values if asked for.

    With a context it is ENAT's SC-attention block: queries from ``x``, keys and values from the
    context and from ``x`` through separate weights (paper Section 4.1), eight modulation vectors.
    Without, it is plain self-attention, for which six vectors suffice (the NAT baseline). The
    context weights exist only if the module is initialised with a context.
    """

    num_heads: int
    mlp_ratio: int
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, modulation, context, mask):
        """One block; the signature suits ``nn.scan``.

        Args:
            x: [b, n, d].
            modulation: [b, 8, d], in the reference's order; [b, 6, d] for a block that never
                has a context.
            context: [b, p, d], or None for plain self-attention.
            mask: bool, broadcastable to [b, h, n, p + n], or None.

        Returns:
            ``(x, None)``.
        """
        width = x.shape[-1]
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, width // self.num_heads)  # noqa: E731
        per_head = (BATCH, None, "tensor", None)
        vectors = [modulation[:, i] for i in range(modulation.shape[1])]
        shift_attn, scale_attn = vectors[:2]
        gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors[-4:]

        y = modulate(x, shift_attn, scale_attn)
        query = heads(Dense((width,), self.dtype, (None, "tensor"), name="query")(y))
        packed = functools.partial(Dense, (2, width), self.dtype, (None, None, "tensor"))
        key_value = packed(name="key_value_self")(y)
        if context is not None:
            shift_ctx, scale_ctx = vectors[2:4]
            of_context = packed(name="key_value_context")(modulate(context, shift_ctx, scale_ctx))
            key_value = jnp.concatenate([of_context, key_value], axis=1)
        key, value = (heads(key_value[:, :, i]) for i in range(2))
        query, key, value = (constrain(y, *per_head) for y in (query, key, value))
        y = attention(query, key, value, mask, self.attention).reshape(x.shape)
        y = Dense((width,), self.dtype, ("tensor", None), name="out")(y)
        x = constrain(x + gate_attn[:, None] * y, BATCH, None, None)
        y = modulate(x, shift_mlp, scale_mlp)
        x = x + gate_mlp[:, None] * Mlp(self.mlp_ratio, self.dtype, name="mlp")(y)
        return constrain(x, BATCH, None, None), None


def stack(num_layers, remat, unroll, name=None, **fields):
    """``num_layers`` blocks as one scanned module with parameters stacked on axis 0.

    Called as ``stack(x, modulation [layers, b, 8, d], context, mask)``.

    Args:
        remat: what the backward pass computes again instead of keeping it: "none"; "dots": all but
            the products with weights; "full": each block, from its input.
        unroll: layers per iteration of the scan.
        fields: of ``Block``.

    Raises:
        ValueError: ``remat`` or ``fields["attention"]`` is none of those.
    """
    if remat != "none" and remat not in REMAT:
        raise ValueError(f"{remat=} is unknown: one of {['none', *REMAT]}")
    if fields["attention"] not in ATTENTION:
        raise ValueError(f"attention={fields['attention']!r} is unknown: one of {ATTENTION}")
    block = Block
    if remat != "none":
        block = nn.remat(Block, prevent_cse=False, policy=REMAT[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=num_layers,
        unroll=unroll,
    )(name=name, **fields)


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


def key_mask(*windows):
    """Which key slots are real: bool [b or 1, 1, 1, sum of sizes], None if all are.

    Each window is ``(size, start, stop)``: slots ``start <= i < stop`` are real; start and stop
    are None (no bound), scalars or int32 [b].
    """
    if all(start is None and stop is None for _, start, stop in windows):
        return None
    parts = []
    for size, start, stop in windows:
        slot = jnp.arange(size)
        real = jnp.ones((1, size), bool)
        if start is not None:
            real &= slot >= jnp.reshape(start, (-1, 1))
        if stop is not None:
            real &= slot < jnp.reshape(stop, (-1, 1))
        parts.append(real)
    rows = max(part.shape[0] for part in parts)
    parts = [jnp.broadcast_to(part, (rows, part.shape[1])) for part in parts]
    return jnp.concatenate(parts, axis=1)[:, None, None]


def append(cache, new, num_cached):
    """Write ``new`` [b, n, d] behind the first ``num_cached`` rows of ``cache`` [b, p, d].

    Returns [b, p + n, d]: room for the whole window wherever it starts, so the write never clamps.
    ``num_cached`` None: the whole cache is real and this is a concatenation.
    """
    if num_cached is None:
        return jnp.concatenate([cache, new], axis=1)
    buffer = jnp.pad(cache, ((0, 0), (0, new.shape[1]), (0, 0)))
    write = jax.lax.dynamic_update_slice_in_dim
    if jnp.ndim(num_cached) == 0:
        return write(buffer, new, num_cached, axis=1)
    return jax.vmap(write, in_axes=(0, 0, 0, None))(buffer, new, num_cached, 0)
