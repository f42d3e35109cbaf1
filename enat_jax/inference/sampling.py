"""The fixed-step sampler: a scan over steps that encodes only the tokens revealed since the last.

The schedule (token counts, temperatures, guidance) is computed on the host. Counts decide the
static window sizes; the steps are cut into segments, each one ``lax.scan`` with windows as large
as its largest step. The number of segments changes speed and compile time, never the tokens:
noise belongs to (seed, image index, step, raster position) and is not drawn in a window's shape.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from enat_jax.inference import guidance, sampler_schedule, sampler_settings, windows
from enat_jax.models import shapes
from enat_jax.models.blocks import Prompt, Text
from enat_jax.models.transformers import Transformer
from enat_jax.runtime import numerics
from enat_jax.schedules import reveal

Settings = sampler_settings.Settings


class Given(NamedTuple):
    """What of each image is known before the first step, in raster order.

    Attributes:
        tokens: int32; of masked places any.
        masked: which are to be drawn. How many of an image are masked, the schedule has to know.
    """

    tokens: Int[Array | np.ndarray, "b l"]
    masked: Bool[Array | np.ndarray, "b l"]


def make(
    model: Transformer, settings: Settings, grid: tuple[int, int] | None = None
) -> Callable[..., Int[Array, "b l"]]:
    """Returns a jitted sampler ``(params, labels, image_index, key) -> tokens``.

    Its arguments and its result are those of ``sample_tokens``. Samplers that differ in guidance or
    temperatures only share one compilation. ``grid``: as for ``sampler_schedule.make``.
    """
    return functools.partial(
        sample_tokens, model, *sampler_schedule.make(settings, model, grid=grid)
    )


@numerics.jit(static_argnames=("model", "static"))
def sample_tokens(
    model: Transformer,
    static: sampler_schedule.Schedule,
    inputs: sampler_schedule.StepInputs,
    params: PyTree,
    labels: Int[Array, " b"],
    image_index: Int[Array, " b"],
    key: Key[Array, ""],
    prompt: Prompt | None = None,
    null_prompt: Prompt | None = None,
    given: Given | None = None,
) -> Int[Array, "b l"]:
    """Draws the tokens of a batch of images.

    Args:
        model, params: the transformer.
        static, inputs: from ``sampler_schedule.make``.
        labels: ``num_classes`` for no class.
        image_index: which image of the seed each row is: an image depends on (key, index, label)
            alone, not on its batch.
        key: typed key of the seed. The noise does not depend on the prompt.
        prompt: texts of the images, for a model that takes them; None: no text.
        null_prompt: with a prompt, what the unconditional branch of guidance sees instead: the
            empty text, or negative prompts. Of one text for all, or of one an image.
        given: tokens that are known, with a schedule for the numbers of the others; they are
            encoded in the first step, for both branches, and stay as they are. None: none.

    Returns:
        int32 tokens in raster order, 0 <= token < v.

    Raises:
        ValueError: an argument has a wrong shape, or of the two prompts only one is given.
    """
    rows = labels, image_index, key, prompt, null_prompt
    order, ids, _ = _run(model, static, inputs, params, *rows, given, trace=False)
    return _in_raster_order(order, ids)


class Trace(NamedTuple):
    """What the sampler knows after each step, all in raster order.

    Attributes:
        tokens: int32; of a masked place the step's guess. The last are the result.
        visible: the places revealed so far, those of the step included.
    """

    tokens: Int[Array | np.ndarray, "t b l"]
    visible: Bool[Array | np.ndarray, "t b l"]


@numerics.jit(static_argnames=("model", "static"))
def trace_tokens(
    model: Transformer,
    static: sampler_schedule.Schedule,
    inputs: sampler_schedule.StepInputs,
    params: PyTree,
    labels: Int[Array, " b"],
    image_index: Int[Array, " b"],
    key: Key[Array, ""],
    prompt: Prompt | None = None,
    null_prompt: Prompt | None = None,
    given: Given | None = None,
) -> Trace:
    """Draws as ``sample_tokens`` does, and returns what every step leaves; likewise ``given``."""
    rows = labels, image_index, key, prompt, null_prompt
    *_, (order, ids) = _run(model, static, inputs, params, *rows, given, trace=True)
    num_visible = order.shape[-1] - inputs.num_left
    visible = jnp.arange(order.shape[-1]) < jnp.reshape(num_visible, (len(order), -1, 1))
    return Trace(
        _in_raster_order(order, ids),
        _in_raster_order(order, jnp.broadcast_to(visible, order.shape)),
    )


def _in_raster_order(order: Int[Array, "*b l"], values: Shaped[Array, "*b l"]) -> Array:
    """``values`` in raster order, which are in reveal order."""
    return jnp.take_along_axis(values, jnp.argsort(order, axis=-1), axis=-1)


def _run(
    model: Transformer,
    static: sampler_schedule.Schedule,
    inputs: sampler_schedule.StepInputs,
    params: PyTree,
    labels: Int[Array, " b"],
    image_index: Int[Array, " b"],
    key: Key[Array, ""],
    prompt: Prompt | None,
    null_prompt: Prompt | None,
    given: Given | None,
    trace: bool,
) -> tuple[Int[Array, "b l"], Int[Array, "b l"], Any]:
    """All steps: the final (order, ids), and with ``trace`` both after each step, [t, b, l]."""
    shapes.check("labels", labels, b=None)
    b, l = labels.shape[0], model.num_tokens  # noqa: E741
    shapes.check("image_index", image_index, b=b)
    apply: Callable[..., Any] = functools.partial(model.apply, {"params": params})
    guided = any(static.guided)
    modulation, text = _conditions(model, apply, labels, prompt, null_prompt, guided)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, image_index)
    order = jnp.broadcast_to(jnp.arange(l, dtype=jnp.int32), (b, l))
    cache = jnp.zeros((modulation.shape[1], 0, model.width), jnp.dtype(model.dtype))
    carry, steps = (order, jnp.zeros((b, l), jnp.int32), cache), []
    if given is not None:
        carry = *_given_first(given, b, l), cache
    for i, segment in enumerate(static.segments):
        order, ids, cache = carry
        if guided and not any(static.guided[i:]):
            guided = False
            modulation, cache, text = guidance.conditional_only(modulation, cache, text)
        room = segment.windows.num_cached + segment.windows.num_new
        cache = jnp.pad(cache, ((0, 0), (0, max(0, room - cache.shape[1])), (0, 0)))[:, :room]
        body = functools.partial(
            _step,
            apply,
            static,
            segment=segment,
            guided=static.guided[i],
            modulation=modulation,
            text=text,
            keys=keys,
            trace=trace,
        )
        part = jax.tree.map(lambda x, s=segment: x[s.start : s.stop], inputs)
        if segment.stop - segment.start == 1:
            carry, step = body((order, ids, cache), jax.tree.map(lambda x: x[0], part))
            steps.append(jax.tree.map(lambda x: x[None], step))
        else:
            carry, step = jax.lax.scan(body, (order, ids, cache), part)
            steps.append(step)
    order, ids, _ = carry
    return order, ids, jax.tree.map(lambda *parts: jnp.concatenate(parts), *steps)


def _given_first(
    given: Given,
    b: int,
    l: int,  # noqa: E741
) -> tuple[Int[Array, "b l"], Int[Array, "b l"]]:
    """Returns (order, ids) in which the given tokens come before the masked ones."""
    shapes.check("the given tokens", given.tokens, b=b, l=l)
    shapes.check("the mask of the given tokens", given.masked, b=b, l=l)
    order = jnp.argsort(jnp.asarray(given.masked), axis=1, stable=True).astype(jnp.int32)
    return order, jnp.take_along_axis(jnp.asarray(given.tokens, jnp.int32), order, axis=1)


def _conditions(
    model: Transformer,
    apply: Callable[..., Any],
    labels: Int[Array, " b"],
    prompt: Prompt | None,
    null_prompt: Prompt | None,
    guided: bool,
) -> tuple[Float[Array, "k rows c d"], Text | None]:
    """What conditions the images, the same at all steps; with guidance two rows an image."""
    if (prompt is None) != (null_prompt is None):
        raise ValueError("a prompt needs a null_prompt beside it, and the other way round")
    for texts, rows in ((prompt, labels.shape[0]), (null_prompt, {1, labels.shape[0]})):
        if texts is not None:
            free = dict.fromkeys("pe"[: texts.tokens.ndim - 1])
            shapes.check("the tokens of a prompt", texts.tokens, b=rows, **free)
    modulation = apply(labels, method="condition")
    text = None if prompt is None else _read(apply, prompt, modulation)
    if not guided:
        return modulation, text
    null = apply(jnp.array([model.num_classes]), method="condition")
    if text is not None and null_prompt is not None:
        of_each = (null.shape[0], null_prompt.tokens.shape[0], *null.shape[2:])
        null_text = _read(apply, null_prompt, jnp.broadcast_to(null, of_each))
        text = guidance.pair_texts(text, null_text)
    return guidance.pair(modulation, jnp.broadcast_to(null, modulation.shape)), text


def _read(
    apply: Callable[..., Any], prompt: Prompt, modulation: Float[Array, "k rows c d"]
) -> Text:
    """A text as it has been read, with all that need not be computed again at every step."""
    return apply(apply(prompt, modulation, method="read"), modulation, method="keep")


def _step(
    apply: Callable[..., Any],
    static: sampler_schedule.Schedule,
    carry: tuple[Int[Array, "b l"], Int[Array, "b l"], Float[Array, "rows p d"]],
    step: sampler_schedule.StepInputs,
    *,
    segment: reveal.Segment,
    guided: bool,
    modulation: Float[Array, "k rows c d"],
    text: Text | None,
    keys: Key[Array, " b"],
    trace: bool,
) -> tuple[tuple, tuple | None]:
    """One sampling step: encode the new tokens, predict the masked, reveal the most confident.

    Returns the new carry ``(order, ids, cache)``, and with ``trace`` its (order, ids).
    """
    order, ids, cache = carry
    # In a segment of one step, if images have one count, every slot of every window is real.
    exact = segment.stop - segment.start == 1 and jnp.ndim(step.num_cached) == 0
    num_visible = step.num_cached + step.num_new
    step_windows = windows.cut(
        *(ids, order, step.num_cached, num_visible, segment.windows),
        num_projected=step.num_projected,
        exact=exact,
    )
    logits, cache = guidance.guided_logits(
        apply, step_windows, modulation, cache, step.guidance, guided, text
    )
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    positions = step_windows.masked.positions
    tokens, confidence = _choose(static, step, log_probs, positions, keys)
    if (real := step_windows.masked_is_real) is not None:
        # The padding comes first and, at +inf under a stable sort, stays there.
        confidence = jnp.where(real, confidence, jnp.inf)
        tokens = jnp.where(real, tokens, step_windows.masked.ids)
    # What is most confident moves to the front of the masked window and so is revealed next.
    rank = jnp.argsort(confidence, axis=1, stable=True, descending=True)
    first = order.shape[1] - positions.shape[1]

    def sort_masked(old: Int[Array, "b l"], masked: Int[Array, "b m"]) -> Int[Array, "b l"]:
        return jnp.concatenate([old[:, :first], jnp.take_along_axis(masked, rank, axis=1)], axis=1)

    order, ids = sort_masked(order, positions), sort_masked(ids, tokens)
    return (order, ids, cache), (order, ids) if trace else None


def _choose(
    static: sampler_schedule.Schedule,
    step: sampler_schedule.StepInputs,
    log_probs: Float[Array, "b m v"],
    positions: Int[Array, "b m"],
    keys: Key[Array, " b"],
) -> tuple[Int[Array, "b m"], Float[Array, "b m"]]:
    """Samples a token for each masked position, and the confidence that decides the order.

    ``keys``: of each image.
    """
    # One key for each (image, step, raster position), so noise knows nothing of windows.
    fold = jax.random.fold_in
    at = jax.vmap(lambda key, row: jax.vmap(lambda p: fold(fold(key, step.step), p))(row))
    noise_keys = None if static.greedy and not static.noisy_order else at(keys, positions)

    def gumbel(shape: tuple[int, ...], stream: int) -> Float[Array, "b m ..."]:
        draw = lambda key: jax.random.gumbel(fold(key, stream), shape, mode="low")  # noqa: E731
        return jax.vmap(jax.vmap(draw))(noise_keys)

    scores = log_probs
    if not static.greedy:
        scores = log_probs / step.token_temperature + gumbel(log_probs.shape[-1:], 0)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if static.rank is not None:
        return tokens, -jnp.array(static.rank, jnp.float32)[positions]
    if static.random_order:
        return tokens, gumbel((), 1)
    confidence = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    if static.noisy_order:
        confidence = confidence + step.mask_temperature * gumbel((), 1)
    return tokens, confidence
