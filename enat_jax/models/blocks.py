"""Transformer blocks, and what they need to run over padded windows with a cache."""

import functools
from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from enat_jax.models import layers
from enat_jax.models.layers import BATCH, Dense, constrain

# How many slots of a window are real: for all images or for each.
Count = Int[Array | np.ndarray, ""] | Int[Array | np.ndarray, " b"] | int


class Prompt(NamedTuple):
    """A text before the transformer has read it.

    Attributes:
        tokens: words, or states of a text encoder, real ones first.
        length: real tokens; None: all.
    """

    tokens: Int[Array | np.ndarray, "b p"] | Float[Array | np.ndarray, "b p e"]
    length: Count | None = None


class Text(NamedTuple):
    """A text as a window of its own beside those of the reveal order: always visible, not counted.

    Attributes:
        features: of the text tokens, real ones first; what they are, ``enat.ENAT.read`` says.
        length: real tokens; None: all.
        kept: keys and values in the layers of the encoder and of the decoder, see
            ``enat.ENAT.keep``; None: they are computed when they are needed.
    """

    features: Float[Array, "b p d"]
    length: Count | None
    kept: tuple[Float[Array, "layers b p 2 d"], ...] | None = None


ATTENTION = ("auto", "xla", "cudnn")
# What cuDNN's kernels take: sizes of a head, and the compute capability of GPUs.
HEADS, AMPERE = range(8, 129, 8), 8.0
KEY_VALUE_AXES = (None, None, "tensor")  # of the mesh, see ``layers.Dense``
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


def shared_parts(
    model: TransformerFields, num_layers: int, num_vectors: int
) -> tuple[layers.TokenEmbedding, layers.Modulation | layers.ConstantModulation, layers.Head]:
    """Makes the parts of a transformer that are not blocks; to be called in its ``setup``.

    Args:
        model: the transformer.
        num_layers: of all stacks together.
        num_vectors: modulation vectors of a layer, see ``Block``.

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
    sizes = num_layers, num_vectors, model.width
    modulation: layers.Modulation | layers.ConstantModulation
    if model.num_classes:
        modulation = layers.Modulation(model.num_classes, *sizes, model.gate_bias, dtype)
    else:
        modulation = layers.ConstantModulation(*sizes, model.gate_bias, dtype)
    return embed, modulation, layers.Head(model.codebook_size, dtype)


def stack(model: TransformerFields, num_layers: int, shared_key_value: bool = False) -> "Block":
    """Makes blocks that are one scanned module, with parameters stacked on axis 0.

    It is called as one ``Block`` is, with modulation [num_layers, b, vectors, d].

    Args:
        model: the transformer, whose fields the blocks take. ``remat`` says what the backward pass
            computes again instead of keeping it: "none"; "dots": all but the products with weights;
            "full": each block, from its input. ``unroll``: layers per iteration of the scan.
        num_layers: number of blocks.
        shared_key_value: see ``Block``.

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
        in_axes=(0, nn.broadcast, nn.broadcast, 0),
        length=num_layers,
        unroll=model.unroll,
    )(model.num_heads, model.mlp_ratio, model.attention, jnp.dtype(model.dtype), shared_key_value)


def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b n d"]:
    """Returns ``LN(x) * (1 + scale) + shift`` in ``x``'s dtype."""
    return (layers.normalize(x) * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


def attention(
    query: Float[Array, "b q h k"],
    key: Float[Array, "b c h k"],
    value: Float[Array, "b c h k"],
    mask: Bool[Array, "#b #h #q c"] | None,
    implementation: str,
) -> Float[Array, "b q h k"]:
    """Multi-head attention, softmax in float32, result in the dtype of ``value``.

    Args:
        query, key, value: of q queries and c keys.
        mask: True where a query may look; None: everywhere.
        implementation: "xla": products and softmax, anywhere; "cudnn": its fused kernels, on NVIDIA
            GPUs since Ampere, bfloat16 and head dimensions that are multiples of 8; "auto": these
            where they run, else "xla".
    """
    if implementation != "auto":
        return _attention(query, key, value, mask, implementation)
    of_xla = functools.partial(_attention, implementation="xla")
    if not (query.size and key.size and _has_cudnn(query)):
        return of_xla(query, key, value, mask)
    # The function may be lowered for another platform than that of this process.
    of_cudnn = functools.partial(_attention, implementation="cudnn")
    return jax.lax.platform_dependent(query, key, value, mask, cuda=of_cudnn, default=of_xla)


def _attention(
    query: Float[Array, "b q h k"],
    key: Float[Array, "b c h k"],
    value: Float[Array, "b c h k"],
    mask: Bool[Array, "#b #h #q c"] | None,
    implementation: str,
) -> Float[Array, "b q h k"]:
    q, c = query.shape[1], key.shape[1]
    lengths = None
    if implementation == "cudnn":  # differentiates attention over even windows only
        even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))  # noqa: E731
        query, key, value = even(query), even(key), even(value)
        if mask is not None:
            rows = q % 2 if mask.shape[2] == q > 1 else 0
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, rows), (0, c % 2)))
        elif c % 2:
            lengths = jnp.full(key.shape[0], c, jnp.int32)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
    found = jax.nn.dot_product_attention(  # type: ignore[call-overload]  # implementation is no Literal
        *(query, key, value),
        mask=mask,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return found[:, :q]


def _has_cudnn(query: Float[Array, "b q h k"]) -> bool:
    """Returns whether this process has a GPU for whose kernels of cuDNN the queries are fit."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    head = query.shape[-1]
    fit = query.dtype == jnp.bfloat16 and head in HEADS
    return fit and float(device.compute_capability) >= AMPERE


class Block(nn.Module):
    """Transformer block with adaptive layer norm, and context keys and values if asked for.

    With a context it is ENAT's SC-attention block: queries from ``x``, keys and values from the
    context and from ``x`` through separate weights (paper Section 4.1), eight modulation vectors.
    Without, it is plain self-attention, for which six vectors suffice (the NAT baseline). The
    context weights exist only if the module is initialised with a context.

    Attributes:
        num_heads: h.
        mlp_ratio: width of the MLP's hidden layer, in d.
        attention: implementation, see ``attention``.
        dtype: of the computation.
        shared_key_value: whether keys and values of the context and of ``x`` come from one layer.
    """

    num_heads: int
    mlp_ratio: int
    attention: str
    dtype: DTypeLike
    shared_key_value: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        modulation: Float[Array, "b vectors d"],
        context: Float[Array, "b p d"] | None,
        mask: Bool[Array, "#b #h #n p+n"] | None,
        kept: Float[Array, "b c 2 d"] | None,
    ) -> tuple[Float[Array, "b n d"], None]:
        """Runs the block; the signature suits ``nn.scan``.

        Args:
            x: features of the block before.
            modulation: eight vectors in the reference's order; six for a block that never has a
                context.
            context: None for plain self-attention.
            mask: True where a query may look, context first; None: everywhere.
            kept: keys and values of context that stands before ``context``; None: there are none.
        """
        width = x.shape[-1]
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, width // self.num_heads)  # noqa: E731
        per_head = (BATCH, None, "tensor", None)
        vectors = [modulation[:, i] for i in range(modulation.shape[1])]
        shift_attn, scale_attn = vectors[:2]
        gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors[-4:]

        y = modulate(x, shift_attn, scale_attn)
        query = heads(Dense((width,), self.dtype, (None, "tensor"), name="query")(y))
        packed = functools.partial(Dense, (2, width), self.dtype, KEY_VALUE_AXES)
        of_self = packed(name="key_value" if self.shared_key_value else "key_value_self")
        key_value = of_self(y)
        if context is not None:
            of_context = of_self if self.shared_key_value else packed(name="key_value_context")
            context = of_context(modulate(context, *vectors[2:4]))
            key_value = jnp.concatenate([context, key_value], axis=1)
        if kept is not None:
            key_value = jnp.concatenate([kept, key_value], axis=1)
        key, value = (heads(key_value[:, :, i]) for i in range(2))
        query, key, value = (constrain(y, *per_head) for y in (query, key, value))
        y = attention(query, key, value, mask, self.attention).reshape(x.shape)
        y = Dense((width,), self.dtype, ("tensor", None), name="out")(y)
        x = constrain(x + gate_attn[:, None] * y, BATCH, None, None)
        y = modulate(x, shift_mlp, scale_mlp)
        x = x + gate_mlp[:, None] * layers.Mlp(self.mlp_ratio, self.dtype, name="mlp")(y)
        return constrain(x, BATCH, None, None), None


def context_key_values(
    stack: Block, context: Float[Array, "b p d"], modulation: Float[Array, "layers b vectors d"]
) -> Float[Array, "layers b p 2 d"]:
    """Returns keys and values of context in all blocks of a ``stack``, as these compute them."""
    found = stack.variables["params"]
    layer = found["key_value" if stack.shared_key_value else "key_value_context"]

    def of_block(_: None, given: tuple) -> tuple[None, Float[Array, "b p 2 d"]]:
        vectors, kernel, bias = given
        x = modulate(context, vectors[:, 2], vectors[:, 3]).astype(stack.dtype)
        return None, layers.linear(x, kernel, bias, KEY_VALUE_AXES)

    parameters = [jnp.asarray(layer[name]) for name in ("kernel", "bias")]
    _, key_values = jax.lax.scan(of_block, None, (modulation, *parameters))
    return key_values


def key_mask(
    *windows: tuple[int, Count | None, Count | None],
) -> Bool[Array, "#b 1 1 c"] | None:
    """Returns which slots of windows that lie side by side are real; None if all are.

    Args:
        windows: of each ``(size, start, stop)``: the slots ``start <= i < stop`` are real; None is
            no bound.
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


def append(
    cache: Float[Array, "b p d"], new: Float[Array, "b n d"], num_cached: Count | None
) -> Float[Array, "b p+n d"]:
    """Writes ``new`` behind the first ``num_cached`` rows of ``cache``.

    The result has room for the whole window wherever it starts, so the write never clamps.
    ``num_cached`` None: the whole cache is real and this is a concatenation.
    """
    if num_cached is None:
        return jnp.concatenate([cache, new], axis=1)
    buffer = jnp.pad(cache, ((0, 0), (0, new.shape[1]), (0, 0)))
    write = jax.lax.dynamic_update_slice_in_dim
    if jnp.ndim(num_cached) == 0:
        return write(buffer, new, num_cached, axis=1)
    return jax.vmap(write, in_axes=(0, 0, 0, None))(buffer, new, num_cached, 0)
