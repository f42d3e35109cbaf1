"""The analytic count of the networks' multiply-adds.

What counts: every dense layer and convolution, and both products of attention (queries with keys,
weights with values). What does not: biases, norms, softmax, activations, look-ups, sampling. A
multiply-add is one; the paper's "GFLOPs" are these, XLA's flops are two each.

Window sizes follow ``reveal.Windows``: cached and newly revealed tokens (the encoder's context and
input), visible and masked tokens (the decoder's context and input). They may be exact counts or
padded sizes: the count is that of the arrays a step computes with. Sizes may be integer arrays,
which broadcast; then the result is an array of their common shape.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from enat_jax.schedules import reveal
from enat_jax.schedules.reveal import Size


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes of a transformer, which ``dims_of`` reads from a model.

    Attributes:
        width: d.
        encoder_layers: over visible tokens (ENAT and the disentangled model).
        decoder_layers: over masked tokens, with the visible ones as context.
        mixed_layers: over visible and masked tokens together (the NAT baseline's only stack).
        num_tokens: l.
        codebook_size: v.
        mlp_ratio: hidden width of the MLPs over d.
        reuse: whether features are cached between steps and go through the projection f.
        reuse_projection: of f, "mlp", "linear" or "none", see ``enat.ReuseProjection``.
        project_once: whether f takes each feature at its first reuse alone.
        labels: whether modulation vectors are made from class labels and not constants.
        text_tokens: p, of every text, its padding included; 0: no text.
        text_width: e, of the states that a text is made from; 0: words of a table, which cost none.
        text_encoding: see ``enat.ENAT``.
        text_kept: whether keys and values of the text are computed once a call, see
            ``keeping_text``.
    """

    width: int
    encoder_layers: int = 0
    decoder_layers: int = 0
    mixed_layers: int = 0
    num_tokens: int = 256
    codebook_size: int = 1024
    mlp_ratio: int = 4
    reuse: bool = True
    reuse_projection: str = "mlp"
    project_once: bool = False
    labels: bool = True
    text_tokens: int = 0
    text_width: int = 0
    text_encoding: str = "once"
    text_kept: bool = False


def dims_of(model: Any) -> Dims:
    """Returns the sizes of an ``enat.ENAT`` or ``nat.NAT`` module, or of anything like them."""
    layers = (
        {"mixed_layers": model.num_layers}
        if hasattr(model, "num_layers")
        else {"encoder_layers": model.encoder_layers, "decoder_layers": model.decoder_layers}
    )
    shared = ["width", "num_tokens", "codebook_size", "mlp_ratio", "reuse"]
    if getattr(model, "takes_text", False):
        layers["text_width"] = model.text_width or 0
        shared += ["text_tokens", "text_encoding"]
    if hasattr(model, "reuse_projection"):
        shared += ["reuse_projection", "project_once"]
    values = {name: getattr(model, name) for name in shared}
    return Dims(**layers, **values, labels=bool(model.num_classes))


def keeping_text(dims: Dims) -> Dims:
    """Returns the sizes for a call of many steps, which need not compute all of the text anew.

    Its keys and values in every layer are part of ``text_cost`` then, unless the text is read
    anew at every step.
    """
    return dataclasses.replace(dims, text_kept=dims.text_encoding != "every_step")


# --- parts ----------------------------------------------------------------------------------


def _sizes(**sizes: Size) -> list[Int[np.ndarray, "..."]]:
    """Returns window sizes as int64 arrays, so that products of large counts do not overflow.

    Raises:
        ValueError: a size is negative or not whole.
    """
    for name, size in sizes.items():
        if np.asarray(size).dtype.kind not in "iu" or np.any(np.less(size, 0)):
            raise ValueError(f"{name}={size!r} must be whole numbers of at least 0")
    return [np.asarray(size, np.int64) for size in sizes.values()]


def _mlp(dims: Dims, tokens: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    return 2 * dims.mlp_ratio * dims.width**2 * tokens


def _projection(dims: Dims, tokens: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Counts f on cached tokens."""
    if dims.reuse_projection == "mlp":
        return _mlp(dims, tokens)
    return (dims.width**2 if dims.reuse_projection == "linear" else 0) * tokens


def _block(
    dims: Dims, queries: Int[np.ndarray, "..."], context: Int[np.ndarray, "..."], text: int = 0
) -> Int[np.ndarray, "..."]:
    """Counts one block without its modulation; nothing where there are no queries.

    ``text``: tokens of a text in the context, beside ``context``.
    """
    d = dims.width
    computed = context if dims.text_kept else context + text
    dense = 4 * d**2 * queries + 2 * d**2 * computed + _mlp(dims, queries)
    attention = 2 * d * queries * (queries + context + text)
    return np.where(queries > 0, dense + attention, 0)


def _head(dims: Dims, tokens: Size, rows: int) -> Size:
    return tokens * (dims.width**2 + dims.width * rows)


def modulation_cost(dims: Dims, rows: int = 1) -> int:
    """Counts the modulation vectors of all layers for ``rows`` labels: 8 a block, 6 in a NAT.

    Constants, of a model without labels, cost nothing.
    """
    if not dims.labels:
        return 0
    vectors = 8 * (dims.encoder_layers + dims.decoder_layers) + 6 * dims.mixed_layers
    return rows * vectors * dims.width**2


def text_cost(dims: Dims, rows: int = 1) -> int:
    """Counts what ``read`` does for ``rows`` texts, and ``keep`` if their keys are kept.

    Otherwise every step pays for them as keys and values.
    """
    p = np.asarray(dims.text_tokens)
    embedding = dims.text_tokens * dims.text_width * dims.width
    encoded = dims.encoder_layers if dims.text_encoding == "once" else 0
    kept = dims.encoder_layers + dims.decoder_layers if dims.text_kept else 0
    key_values = kept * 2 * dims.width**2 * dims.text_tokens
    return rows * (embedding + encoded * int(_block(dims, p, np.zeros_like(p))) + key_values)


def encode_cost(
    dims: Dims, num_cached: Size, num_new: Size, num_projected: Size = 0
) -> Int[np.ndarray, "..."]:
    """Counts one ``encode`` of an image and branch: f on the cache, the encoder on the new tokens.

    Args:
        dims: sizes of the model.
        num_cached, num_new: window sizes. Without new tokens only f is paid, unless the encoder
            reads a text at every step.
        num_projected: of the cached tokens, those that f need not take if ``dims.project_once``.

    Returns:
        int64 multiply-adds.

    Raises:
        ValueError: a size is negative or not whole.
    """
    cached, new, projected = _sizes(
        num_cached=num_cached, num_new=num_new, num_projected=num_projected
    )
    with_new = dims.text_tokens if dims.text_encoding == "every_step" else 0
    blocks = _block(dims, new + with_new, cached, dims.text_tokens - with_new)
    taken = cached - projected if dims.project_once else cached
    return _projection(dims, taken) + dims.encoder_layers * blocks


def decode_cost(dims: Dims, num_visible: Size, num_masked: Size) -> Int[np.ndarray, "..."]:
    """Counts one ``decode`` of an image and branch, the head on masked tokens and the codes only.

    A NAT runs its stack over visible and masked tokens here, even where nothing is masked.

    Args:
        dims: sizes of the model.
        num_visible, num_masked: window sizes.

    Returns:
        int64 multiply-adds.

    Raises:
        ValueError: a size is negative or not whole.
    """
    visible, masked = _sizes(num_visible=num_visible, num_masked=num_masked)
    blocks = dims.decoder_layers * _block(dims, masked, visible, dims.text_tokens)
    mixed = dims.mixed_layers * _block(dims, visible + masked, np.zeros_like(masked))
    return blocks + mixed + _head(dims, masked, dims.codebook_size)


# --- sampling -------------------------------------------------------------------------------


def step_cost(
    dims: Dims,
    num_cached: Size,
    num_new: Size,
    num_visible: Size,
    num_masked: Size,
    *,
    num_projected: Size = 0,
    encode_branches: Size = 1,
    decode_branches: Size = 1,
) -> Int[np.ndarray, "..."]:
    """Counts one sampling step of an image without what is computed once a call.

    That is its modulation, and the reading of its text, with its keys and values if
    ``dims.text_kept``.

    Args:
        dims: sizes of the model.
        num_cached, num_new, num_visible, num_masked: window sizes as in ``reveal.Windows``.
        num_projected: as for ``encode_cost``.
        encode_branches: guidance branches that are encoded, 1 or 2.
        decode_branches: guidance branches that are decoded, 1 or 2.

    Returns:
        int64 multiply-adds.

    Raises:
        ValueError: a size is negative or not whole.
    """
    encode = encode_branches * encode_cost(dims, num_cached, num_new, num_projected)
    return encode + decode_branches * decode_cost(dims, num_visible, num_masked)


def exact_sampling_cost(
    dims: Dims,
    num_steps: int,
    *,
    guided: bool | Bool[np.ndarray, " t"] = True,
    counts: Sequence[int] | None = None,
    batch_size: int = 1,
) -> int:
    """Counts a call of the sampler without padding, as exact work.

    What the reference computes in vain is not counted: the unconditional branch is decoded only
    where it has a weight, and encoded up to there; modulation and text are computed once for every
    image and once for "no class" and "no text"; the head sees masked tokens only. With
    ``dims.project_once`` each feature passes through f once; the sampler's programs still compute
    f for all cached tokens, which is padding.

    Args:
        dims: sizes of the model.
        num_steps: t, at least 1.
        guided: which steps have a guidance weight, or whether all but the first have.
        counts: tokens revealed in each step; None: by the cosine schedule.
        batch_size: images of the call.

    Returns:
        Multiply-adds of the whole batch.
    """
    steps = reveal.sampling_steps(dims.num_tokens, num_steps, dims.reuse, revealed=counts)
    if np.ndim(guided) == 0:
        guided = (np.arange(num_steps) > 0) & guided
    projected = steps.num_projected
    return _sampling_cost(dims, steps.sizes, np.asarray(guided), 1, batch_size, projected)


def padded_sampling_cost(
    dims: Dims,
    segments: Sequence[reveal.Segment],
    guided: Sequence[bool],
    *,
    batch_size: int = 1,
) -> int:
    """Counts a call of the sampler as it is computed, in the windows of its segments.

    Args:
        dims: sizes of the model.
        segments: of ``reveal.cut_segments``.
        guided: for each segment, whether it decodes the unconditional branch too. Up to the last
            that does, all encode it.
        batch_size: images of the call.

    Returns:
        Multiply-adds of the whole batch.
    """
    sizes = np.array([segment.windows for segment in segments]).T
    num_steps = np.array([segment.stop - segment.start for segment in segments])
    return _sampling_cost(dims, sizes, np.asarray(guided), num_steps, batch_size)


def _sampling_cost(
    dims: Dims,
    sizes: Iterable[Size],
    guided: Bool[np.ndarray, " n"],
    times: Size,
    batch_size: int,
    projected: Size = 0,
) -> int:
    """Counts a call of the sampler of steps with these window sizes, each run so many times."""
    dims = keeping_text(dims)
    guided_later = np.logical_or.accumulate(guided[::-1])[::-1]
    steps = step_cost(
        dims,
        *sizes,
        num_projected=projected,
        encode_branches=1 + guided_later,
        decode_branches=1 + guided,
    )
    rows = batch_size + int(guided.any())
    once = modulation_cost(dims, rows) + text_cost(dims, rows)
    return int(batch_size * (times * steps).sum() + once)


def paper_cost(dims: Dims, num_steps: int) -> int:
    """Counts an image as the "GFLOPs" of the paper's Tables 1 and 6 do, without image decoder.

    Both guidance branches at every step, the first included; the modulation once a step and
    branch; the head on all l tokens and with the row of [MASK]. The encoder of a text is another
    model, and not counted.

    Args:
        dims: sizes of the model.
        num_steps: t, at least 1.

    Returns:
        Multiply-adds.
    """
    steps = reveal.sampling_steps(dims.num_tokens, num_steps, dims.reuse)
    head = _head(dims, dims.num_tokens, dims.codebook_size + 1)
    counted_head = _head(dims, steps.num_masked, dims.codebook_size)
    step = step_cost(dims, *steps.sizes)
    step = step - counted_head + head + modulation_cost(dims)
    return int(2 * (step.sum() + text_cost(dims)))


# --- training -------------------------------------------------------------------------------


def training_cost(
    dims: Dims,
    num_cached: Size,
    num_new: Size,
    num_visible: Size,
    num_masked: Size,
    reveals: int = 1,
    num_projected: Size = 0,
) -> Int[np.ndarray, "..."]:
    """Counts an image of a training step, forward and backward, and the EMA pass of its cache.

    The backward pass counts as twice the forward pass, for every part that is trained; the few
    products it saves (no gradient into the cache, none into the head's table) are not deducted.
    The EMA model encodes the cached tokens, forward only, and reads the text for itself. In one
    reveal it needs no cache of its own; every further one is computed in windows that hold all
    cached tokens, whatever it reveals. The frozen encoder of a text is another model, and not
    counted. Recomputation (remat) is not counted, nor is the optimizer.

    Args:
        dims: sizes of the model.
        num_cached, num_new, num_visible, num_masked: window sizes as in ``reveal.Windows``;
            without cached tokens there is no EMA pass.
        reveals: in which the cache is made, see ``reveal.SplitDistribution``.
        num_projected: as for ``encode_cost``, of the model that is trained.

    Returns:
        int64 multiply-adds.

    Raises:
        ValueError: a size is negative or not whole.
    """
    windows = num_cached, num_new, num_visible, num_masked
    student = step_cost(dims, *windows, num_projected=num_projected)
    student = student + modulation_cost(dims) + text_cost(dims)
    encoder = dataclasses.replace(dims, decoder_layers=0)
    ema = encode_cost(dims, 0, num_cached) + modulation_cost(encoder) + text_cost(dims)
    ema = ema + (reveals - 1) * encode_cost(dims, num_cached, num_cached)
    return 3 * student + np.where(np.greater(num_cached, 0), ema, 0)


def exact_training_cost(
    dims: Dims, num_cached: Size, num_visible: Size, earlier: Sequence[int] = ()
) -> Int[np.ndarray, "..."]:
    """Counts as ``training_cost`` does, without padding, for splits with these counts.

    ``earlier``: as in ``reveal.Split``; each reveal counts what it encodes.
    """
    cached, visible = _sizes(num_cached=num_cached, num_visible=num_visible)
    starts, ends = [0, *earlier], [*earlier, num_cached]
    windows = cached, visible - cached, visible, dims.num_tokens - visible
    total = training_cost(dims, *windows, num_projected=starts[-1])
    if not any(earlier):
        return total
    before = [0, *starts[:-1]]  # cached in the reveal before, too
    parts = [encode_cost(dims, a, b - a, c) for a, b, c in zip(starts, ends, before, strict=True)]
    return total - encode_cost(dims, 0, cached) + sum(parts)


# --- tokenizer ------------------------------------------------------------------------------


def _conv(positions: int, size: int, inputs: int, outputs: int) -> int:
    return positions * size**2 * inputs * outputs


def _res_block(positions: int, inputs: int, outputs: int) -> int:
    # In MaskGIT's VQGAN the shortcut is applied to the block's output, hence outputs x outputs.
    shortcut = 0 if inputs == outputs else _conv(positions, 1, outputs, outputs)
    return _conv(positions, 3, inputs, outputs) + _conv(positions, 3, outputs, outputs) + shortcut


def image_decoder_cost(tokenizer: Any, grid_height: int, grid_width: int) -> int:
    """Counts a VQGAN's decoder from a grid of codes to one image; padding counts as pixels.

    Args:
        tokenizer: a ``vqgan.VQGAN`` module.
        grid_height, grid_width: tokens along each side.

    Returns:
        Multiply-adds.
    """
    positions = grid_height * grid_width
    multipliers = tokenizer.channel_multipliers
    inputs = tokenizer.channels * multipliers[-1]
    total = _conv(positions, 3, tokenizer.embed_dim, inputs)
    total += 2 * _res_block(positions, inputs, inputs)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        outputs = tokenizer.channels * multiplier
        for _ in range(tokenizer.num_res_blocks):
            total += _res_block(positions, inputs, outputs)
            inputs = outputs
        if level:
            positions *= 4
            total += _conv(positions, 3, outputs, outputs)
    return total + _conv(positions, 3, inputs, tokenizer.image_channels)
