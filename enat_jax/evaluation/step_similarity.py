"""Similarity of token features in adjacent sampling steps, place by place (paper Figure 5).

The paper's reason for reusing features: between two steps hardly anything changes but the tokens
that have just been revealed. Here a step's features are those of a pass that reuses nothing, so
that what is compared is what the step would compute anew:

- ENAT, also the disentangled model: of a visible token the encoder's output, with all visible
  tokens encoded together and no cache; of a masked token the decoder's output before the head.
- NAT: of any token the output of its one stack before the head.

The pass sees the label; of the guidance branches it is the conditional one. Passes are numbered
from 0, as the sampler's steps; pass s sees what the steps before s revealed. Compared are, by the
cosine, the features of the same place in passes s - 1 and s, in three groups:

    already visible   visible in both passes
    newly revealed    masked in pass s - 1, visible in pass s: in an ENAT from the decoder's output
                      to the encoder's, two networks that share no layer
    masked            masked in both passes

A model that reuses features is also run as the sampler runs it, and its features of pass s compared
with the recomputed ones of the same pass: what reuse costs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, PyTree

from enat_jax.inference import sampler_schedule, sampling, windows
from enat_jax.models import nat
from enat_jax.models.transformers import Transformer
from enat_jax.runtime import numerics
from enat_jax.schedules import reveal

GROUPS = ("already visible", "newly revealed", "masked")


class Similarities(NamedTuple):
    """Similarities of passes 1 to t - 1 to the pass before each, in raster order.

    Attributes:
        group: index into ``GROUPS``.
        adjacent: in [-1, 1], of the features of this place in the pass before and in this one.
        elsewhere: in [-1, 1], of the features in this pass and those in the pass before of another
            place of the same group and image: how alike tokens are anyhow. nan where the group has
            no other place.
        reused: in [-1, 1], of the features with reuse and the recomputed ones of this pass; None
            for a model that reuses nothing.
        overlap: in [0, 1], share of the predicted probabilities that both have in common (1 minus
            their total variation distance); of masked places, nan elsewhere. None as ``reused``.
        same_code: 1 where the most probable code is the same and 0 where not; of masked places, nan
            elsewhere. None as ``reused``.
    """

    group: Int8[np.ndarray, "b t-1 l"]
    adjacent: Float[np.ndarray, "b t-1 l"]
    elsewhere: Float[np.ndarray, "b t-1 l"]
    reused: Float[np.ndarray, "b t-1 l"] | None
    overlap: Float[np.ndarray, "b t-1 l"] | None
    same_code: Float[np.ndarray, "b t-1 l"] | None

    def select(self, images: slice) -> "Similarities":
        """Returns those of some images."""
        values: list[Any] = [None if x is None else x[images] for x in self]
        return Similarities(*values)


def draw(
    model: Transformer,
    params: PyTree,
    settings: sampling.Settings,
    labels: Int[np.ndarray, " b"],
    image_index: Int[np.ndarray, " b"],
    seed: int,
    grid: tuple[int, int] | None = None,
) -> tuple[Int[np.ndarray, "b l"], Int[np.ndarray, "b l"]]:
    """Draws tokens as the sampler does; ``grid``: as for ``sampler_schedule.make``.

    Returns:
        The tokens, and the step (from 0) that revealed each of them, in raster order.
    """
    static, inputs = sampler_schedule.make(settings, model, grid=grid)
    trace = sampling.trace_tokens(
        model, static, inputs, params, labels, image_index, numerics.key(seed)
    )
    return np.asarray(trace.tokens[-1]), np.asarray(trace.visible).argmax(axis=0).astype(np.int32)


def similarities_of_passes(
    model: Transformer,
    params: PyTree,
    tokens: Int[np.ndarray, "b l"],
    step: Int[np.ndarray, "b l"],
    labels: Int[np.ndarray, " b"],
    num_steps: int,
    step_counts: Sequence[int] | None = None,
) -> Similarities:
    """Returns the similarities of the passes of t = ``num_steps`` sampling steps.

    Args:
        model: the transformer.
        params: its parameters.
        tokens: of the images, from ``draw``.
        step: that revealed each token, from ``draw``.
        labels: of the images.
        num_steps: t, at least 2.
        step_counts: tokens revealed in each step; None: by the cosine schedule.

    Raises:
        ValueError: if there are no two steps, or ``step`` is not of so many.
    """
    if num_steps < 2:
        raise ValueError(f"{num_steps=}: a similarity of adjacent steps needs two of them")
    order = np.argsort(step, axis=1, kind="stable").astype(np.int32)
    steps = reveal.sampling_steps(model.num_tokens, num_steps, revealed=step_counts)
    revealed = np.repeat(np.arange(num_steps), steps.num_masked - steps.num_left)
    if np.any(np.take_along_axis(np.asarray(step), order, axis=1) != revealed):
        raise ValueError(f"these tokens were not revealed in {num_steps} steps")
    ids = np.take_along_axis(np.asarray(tokens, np.int32), order, axis=1)
    counts = np.stack([steps.num_cached, steps.num_visible, steps.num_projected], axis=1)
    counts = counts.astype(np.int32)
    found = _compare_passes(
        model, int(steps.num_new.max()), params, ids, order, np.asarray(labels, np.int32), counts
    )
    rank = np.argsort(order, axis=1)[:, None]

    def raster(of_passes: Float[Array, "t b l"] | Int8[np.ndarray, "t b l"]) -> np.ndarray:
        """Returns [b, t - 1, l] in raster order; pass 0 has none before it."""
        return np.take_along_axis(np.swapaxes(np.asarray(of_passes)[1:], 0, 1), rank, axis=2)

    slot = np.arange(model.num_tokens)
    group = np.int8(slot >= steps.num_cached[:, None]) + (slot >= steps.num_visible[:, None])
    group = np.broadcast_to(group[:, None], (num_steps, *order.shape)).astype(np.int8)
    values: list[Any] = [None if x is None else raster(x) for x in found]
    return Similarities(raster(group), *values)


@numerics.jit(static_argnames=("model", "most_new"))
def _compare_passes(
    model: Transformer,
    most_new: int,
    params: PyTree,
    ids: Int[Array, "b l"],
    order: Int[Array, "b l"],
    labels: Int[Array, " b"],
    counts: Int[Array, "t 2"],
) -> tuple[Float[Array, "t b l"] | None, ...]:
    """Returns what ``Similarities`` has but the group, in reveal order.

    Every window has room for all tokens and says how many are real: one compiled pass for all.

    Args:
        model: the transformer.
        most_new: the most tokens that a step encodes.
        params: of the transformer.
        ids: codes in reveal order.
        order: raster positions in reveal order.
        labels: of the images.
        counts: tokens visible in the pass before and in this one, and of the former those that
            have been projected.
    """
    apply: Callable[..., Any] = functools.partial(model.apply, {"params": params})
    modulation = apply(labels, method="condition")
    l = model.num_tokens  # noqa: E741
    sizes = reveal.Windows(l, most_new, l, l)
    slot = jnp.arange(l)
    features = functools.partial(_features, apply, model, order, modulation)

    def compare(carry: Any, count: tuple[Array, ...]) -> tuple[Any, tuple]:
        before, cache = carry
        num_cached, num_visible, num_projected = count
        fresh = apply(ids, order, modulation, num_new=num_visible, method="encode")
        now = features(fresh, num_visible)
        neighbour = _next_of_group(slot, num_cached, num_visible)
        elsewhere = _cosine(before[:, neighbour], now)
        similar = _cosine(before, now), jnp.where(neighbour == slot, jnp.nan, elsewhere)
        if not model.reuse:
            return (now, None), (*similar, None, None, None)
        step = windows.cut(ids, order, num_cached, num_visible, sizes)
        once = {"num_projected": num_projected} if model.project_once else {}
        cache = apply(
            step.new.ids,
            step.new.positions,
            modulation,
            cache,
            num_new=step.num_new,
            num_cached=step.num_cached,
            method="encode",
            **once,
        )[:, :l]
        reused = _cosine(features(cache, num_visible), now)
        decode: Callable[..., Any] = functools.partial(
            apply,
            order,
            modulation,
            num_masked=step.num_masked,
            num_visible=step.num_visible,
            method="decode",
        )
        logits = [decode(cache=x) for x in (cache, fresh)]
        overlap = jnp.minimum(*(jax.nn.softmax(x, axis=-1) for x in logits)).sum(axis=-1)
        codes = [x.argmax(axis=-1) for x in logits]
        predicted = (overlap, (codes[0] == codes[1]).astype(jnp.float32))
        of_masked = (jnp.where(slot >= num_visible, x, jnp.nan) for x in predicted)
        return (now, cache), (*similar, reused, *of_masked)

    empty = jnp.zeros((*ids.shape, model.width), jnp.dtype(model.dtype))
    before: Any = (empty, empty if model.reuse else None)
    _, found = jax.lax.scan(compare, before, tuple(counts.T))
    return found


def _features(
    apply: Callable[..., Any],
    model: Transformer,
    order: Int[Array, "b l"],
    modulation: PyTree,
    cache: Float[Array, "b p d"],
    num_visible: Int[Array, ""],
) -> Float[Array, "b l d"]:
    """Returns features of all tokens in reveal order, of the visible ones those of ``cache``.

    In a NAT ``cache`` holds embeddings only, and the features of visible tokens come out of the
    same stack as those of the masked ones.
    """
    l = model.num_tokens  # noqa: E741
    masked = apply(
        order,
        modulation,
        cache,
        num_masked=l - num_visible,
        num_visible=num_visible,
        method="features",
    )
    if isinstance(model, nat.NAT):
        cache, masked = masked[:, :l], masked[:, l:]
    return jnp.where((jnp.arange(l) < num_visible)[:, None], cache, masked)


def _next_of_group(
    slot: Int[Array, " l"], num_cached: Int[Array, ""], num_visible: Int[Array, ""]
) -> Int[Array, " l"]:
    """Returns the next slot of the same group for each slot of the reveal order.

    The last slot of a group is followed by the first.
    """
    start = jnp.where(slot < num_cached, 0, jnp.where(slot < num_visible, num_cached, num_visible))
    stop = jnp.where(
        slot < num_cached, num_cached, jnp.where(slot < num_visible, num_visible, slot.size)
    )
    return jnp.where(slot + 1 < stop, slot + 1, start)


def _cosine(x: Float[Array, "b l d"], y: Float[Array, "b l d"]) -> Float[Array, "b l"]:
    """Returns the cosine of the angles between vectors, in float32; 0 where a vector is 0."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (x * y).sum(axis=-1) / jnp.where(norms > 0, norms, 1)
