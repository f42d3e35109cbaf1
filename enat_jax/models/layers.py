"""Building blocks shared by the transformers (method: paper Section 4, reference ``models``)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal(stddev=0.02)

# The reference embeds with LN eps 1e-6 and normalises in the head with eps 1e-5.
BLOCK_EPS = 1e-6
HEAD_EPS = 1e-5


def normalize(x, eps=BLOCK_EPS):
    """Layer norm without affine over the last axis, in float32; returns ``x``'s dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


def modulate(x, shift, scale):
    """``LN(x) * (1 + scale) + shift``; x [b, n, d], shift and scale [b, d]."""
    return normalize(x) * (1 + scale[:, None]) + shift[:, None]


def attention(query, key, value, mask=None):
    """Multi-head attention, softmax in float32.

    Args:
        query: [b, q, h, k].
        key, value: [b, c, h, k].
        mask: bool, broadcastable to [b, h, q, c], True where a query may look; None: everywhere.

    Returns:
        [b, q, h, k] in the dtype of ``value``.
    """
    logits = jnp.einsum("bqhk,bchk->bhqc", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if mask is not None:
        # Finite: with -inf a query whose keys are all padding would have NaN gradients.
        logits = jnp.where(mask, logits, -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqc,bchk->bqhk", weights, value)


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
        return normalize(x, self.eps) * scale.astype(x.dtype) + bias.astype(x.dtype)


class Mlp(nn.Module):
    """d -> ratio * d -> d with tanh-GELU."""

    ratio: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = nn.Dense(self.ratio * width, kernel_init=xavier, dtype=self.dtype, name="up")(x)
        x = jax.nn.gelu(x, approximate=True)
        return nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="down")(x)


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
        # Loaded parameters are numpy arrays, which a traced index cannot index.
        word, position = jnp.asarray(self.word), jnp.asarray(self.position)
        x = self.norm(word[ids] + position[positions])
        return self.drop(x, deterministic=deterministic).astype(self.dtype)


class Head(nn.Module):
    """Features to logits: LN, dense, exact GELU, LN, times the transposed word table, + bias."""

    codebook_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, word):
        """x [b, m, d], word [v + 1, d]; returns float32 logits [b, m, v]."""
        x = LayerNorm(HEAD_EPS, name="norm_in")(x)
        x = nn.Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="dense")(x)
        x = LayerNorm(HEAD_EPS, name="norm_out")(jax.nn.gelu(x, approximate=False))
        # Kept from the reference: the tied table gets no gradient through the head, and the bias
        # has a row for [MASK] although only the codes are ever predicted.
        bias = self.param("bias", nn.initializers.zeros, (self.codebook_size + 1,))
        codes = jax.lax.stop_gradient(word)[: self.codebook_size].astype(self.dtype)
        logits = jnp.einsum("bmd,vd->bmv", x, codes, preferred_element_type=jnp.float32)
        return logits + bias[: self.codebook_size]


class Block(nn.Module):
    """Transformer block with adaptive layer norm, and context keys and values if asked for.

    With a context it is ENAT's SC-attention block: queries from ``x``, keys and values from the
    context and from ``x`` through separate weights (paper Section 4.1), eight modulation vectors.
    Without, it is plain self-attention, for which six vectors suffice (the NAT baseline). The
    context weights exist only if the module is initialised with a context.
    """

    num_heads: int
    mlp_ratio: int
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
        dense = lambda features, name: nn.Dense(  # noqa: E731
            features, kernel_init=xavier, dtype=self.dtype, name=name
        )
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, width // self.num_heads)  # noqa: E731
        vectors = [modulation[:, i] for i in range(modulation.shape[1])]
        shift_attn, scale_attn = vectors[:2]
        gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors[-4:]

        y = modulate(x, shift_attn, scale_attn)
        query = heads(dense(width, "query")(y))
        key_value = dense(2 * width, "key_value_self")(y)
        if context is not None:
            shift_ctx, scale_ctx = vectors[2:4]
            of_context = dense(2 * width, "key_value_context")(
                modulate(context, shift_ctx, scale_ctx)
            )
            key_value = jnp.concatenate([of_context, key_value], axis=1)
        key, value = (heads(y) for y in jnp.split(key_value, 2, axis=-1))
        y = attention(query, key, value, mask).reshape(x.shape)
        x = x + gate_attn[:, None] * dense(width, "out")(y)
        y = modulate(x, shift_mlp, scale_mlp)
        x = x + gate_mlp[:, None] * Mlp(self.mlp_ratio, self.dtype, name="mlp")(y)
        return x, None


def stack(num_layers, remat, unroll, name=None, **fields):
    """``num_layers`` blocks as one scanned module with parameters stacked on axis 0.

    Called as ``stack(x, modulation [layers, b, 8, d], context, mask)``.
    """
    block = nn.remat(Block, prevent_cse=False) if remat else Block
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=num_layers,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
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
    def __call__(self, labels):
        """labels int32 [b], num_classes for no class; returns [layers, b, vectors, d]."""
        table = self.param("label_table", normal, (self.num_classes + 1, self.width))
        size = self.num_vectors * self.width
        kernel = self.param("kernel", nn.initializers.zeros, (self.num_layers, self.width, size))
        bias = self.param("bias", self._init_bias, (self.num_layers, size))
        c = jax.nn.silu(jnp.asarray(table)[labels]).astype(self.dtype)
        vectors = jnp.einsum("bd,lde->lbe", c, kernel.astype(self.dtype))
        vectors = vectors + bias[:, None].astype(self.dtype)
        return vectors.reshape(self.num_layers, -1, self.num_vectors, self.width)

    def _init_bias(self, key, shape):
        bias = jnp.zeros((self.num_layers, self.num_vectors, self.width))
        gates = jnp.array([self.num_vectors - 4, self.num_vectors - 1])
        return bias.at[:, gates].set(self.gate_bias).reshape(shape)
