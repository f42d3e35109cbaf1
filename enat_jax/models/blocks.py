"""Transformer blocks, and what they need to run over padded windows with a cache."""

import functools
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from enat_jax.models import layers
from enat_jax.models.layers import BATCH, Dense, constrain

ATTENTION = ("xla", "cudnn")
REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names("dense"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class TransformerFields(Protocol):
    """The fields that every transformer has, see ``enat.ENAT``."""

    num_tokens: int
    codebook_size: int
    num_classes: int
    width: int
    num_heads: int
    mlp_ratio: int
    dropout: float
    position_init: str
    word_std: float
    gate_bias: float
    remat: str
    attention: str
    unroll: int
    dtype: str


def shared_parts(model, num_layers, num_vectors):
    """The parts of a transformer that are not blocks; call it in ``setup``.

    Args:
        model: the transformer.
        num_layers: of all stacks together.
        num_vectors: modulation vectors of a layer, see ``Block``.

    Returns:
        Embedding, modulation and head.

    Raises:
        ValueError: ``num_heads`` does not divide ``width``.
    """
    if model.width % model.num_heads:
        raise ValueError(
            f"self.width={model.width} is not divisible by self.num_heads={model.num_heads}"
        )
    dtype = jnp.dtype(model.dtype)
    embed = layers.TokenEmbedding(
        model.num_tokens,
        model.codebook_size,
        model.width,
        model.dropout,
        model.position_init,
        model.word_std,
        dtype,
    )
    modulation = layers.Modulation(
        model.num_classes, num_layers, num_vectors, model.width, model.gate_bias, dtype
    )
    return embed, modulation, layers.Head(model.codebook_size, dtype)


def stack(model, num_layers):
    """``num_layers`` blocks as one scanned module with parameters stacked on axis 0.

    Called as ``stack(x, modulation [layers, b, 8, d], context, mask)``.

    Args:
        model: the transformer, whose fields the blocks take. ``remat`` says what the backward pass
            computes again instead of keeping it: "none"; "dots": all but the products with weights;
            "full": each block, from its input. ``unroll``: layers per iteration of the scan.

    Raises:
        ValueError: ``remat`` or ``attention`` of the model is none of those.
    """
    if model.remat != "none" and model.remat not in REMAT:
        raise ValueError(f"remat={model.remat!r} is unknown: one of {['none', *REMAT]}")
    if model.attention not in ATTENTION:
        raise ValueError(f"attention={model.attention!r} is unknown: one of {ATTENTION}")
    block = Block
    if model.remat != "none":
        block = nn.remat(Block, prevent_cse=False, policy=REMAT[model.remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=num_layers,
        unroll=model.unroll,
    )(model.num_heads, model.mlp_ratio, model.attention, jnp.dtype(model.dtype))


def modulate(x, shift, scale):
    """``LN(x) * (1 + scale) + shift`` in ``x``'s dtype; x [b, n, d], shift and scale [b, d]."""
    return (layers.normalize(x) * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


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
        x = x + gate_mlp[:, None] * layers.Mlp(self.mlp_ratio, self.dtype, name="mlp")(y)
        return constrain(x, BATCH, None, None), None


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
