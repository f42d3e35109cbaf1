"""The fixed-step sampler: a scan over steps that encodes only the tokens revealed since the last.

The schedule (token counts, temperatures, guidance) is computed on the host. Counts decide the
static window sizes; the steps are cut into segments, each one ``lax.scan`` with windows as large
as its largest step. The number of segments changes speed and compile time, never the tokens:
noise belongs to (seed, image index, step, raster position) and is not drawn in a window's shape.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.schedules import costs, reveal

SCHEDULES = ("linear", "constant", "cosine", "interval")  # of guidance
MAX_STEPS = 4096  # four times the tokens of the largest model; the rest would reveal nothing
MAX_VALUE = 1e6  # of temperatures and the guidance scale; float32 overflows far beyond it
MAX_BODIES = 16  # compiled without being asked for; more cost more time than padding does


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampler settings (method: paper Section 4 and reference; defaults: ENAT-L, ImageNet-256).

    Attributes:
        num_steps: t, from 1 to 4096. More steps than tokens are allowed; some steps
            then reveal nothing (so do the first steps when t is little below l).
        guidance_scale: of classifier-free guidance, which adds weight * (conditional -
            unconditional) to the conditional logits. 0: no unconditional branch.
        guidance_schedule: weight of step s = 0 ... t - 1: "linear": ``scale * s / t``, the
            reference's, which never reaches the scale; "constant": the scale; "cosine":
            ``scale * (1 - cos(pi * s / t)) / 2``, slower than linear first and faster later;
            "interval": the scale while ``low <= s / t < high`` and nothing outside, where the
            unconditional branch is not decoded (Kynkäänniemi et al. 2024, arXiv 2404.07724, who
            cut noise levels; here it is a share of the steps).
        guidance_interval: (low, high), 0 <= low < high <= 1; only "interval" has a use for it.
        token_temperature: the reference's ``samp_temp``; falls linearly to 0. 0: argmax.
        mask_temperature: the reference's ``mask_temp``, scale of the Gumbel noise on the
            confidences; falls linearly to 0. 0: no noise.
        num_segments: compiled bodies; 1 compiles fastest and pads most, ``num_steps`` pads
            nothing. None: ``num_steps``, but no more than 16.
    """

    num_steps: int = 8
    guidance_scale: float = 2.5
    token_temperature: float = 6.0
    mask_temperature: float = 1.5
    num_segments: int | None = None
    guidance_schedule: str = "linear"
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        for name in ("num_steps", "num_segments"):
            value = getattr(self, name)
            if value is None and name == "num_segments":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if self.num_steps > MAX_STEPS:
            raise ValueError(f"num_steps={self.num_steps} must be at most {MAX_STEPS}")
        for name in ("guidance_scale", "token_temperature", "mask_temperature"):
            value = getattr(self, name)
            if not math.isfinite(value) or not 0 <= value <= MAX_VALUE:
                raise ValueError(f"{name}={value!r} must be a number from 0 to {MAX_VALUE:,.0f}")
        if self.guidance_schedule not in SCHEDULES:
            raise ValueError(
                f"guidance_schedule={self.guidance_schedule!r} is none of {', '.join(SCHEDULES)}"
            )
        object.__setattr__(self, "guidance_interval", _interval(self.guidance_interval))
        guided = self.guidance_weights() > 0
        if self.guidance_schedule == "interval" and self.guidance_scale > 0 and not guided.any():
            raise ValueError(
                f"guidance_interval={self.guidance_interval} has none of the {self.num_steps} "
                "steps in it: widen it, or turn guidance off by guidance_scale=0"
            )

    def guidance_weights(self):
        """Weight of guidance at each step, float64 [t]."""
        share = np.arange(self.num_steps) / self.num_steps
        if self.guidance_schedule == "linear":
            return share * self.guidance_scale
        if self.guidance_schedule == "cosine":
            return (1 - np.cos(np.pi * share)) / 2 * self.guidance_scale
        low, high = (0.0, 1.0) if self.guidance_schedule == "constant" else self.guidance_interval
        return np.where((low <= share) & (share < high), self.guidance_scale, 0.0)


def _interval(value):
    """A checked guidance interval, hashable whether it was written as a tuple or read as a list."""
    try:
        low, high = (float(x) for x in value)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance_interval={value!r} must be two numbers, low and high, with "
            "0 <= low < high <= 1"
        )
    return low, high


class StepInputs(NamedTuple):
    """What the scan is fed, one entry a step: [t] each."""

    index: jax.Array  # int32
    num_cached: jax.Array  # int32, as reveal.Steps
    num_new: jax.Array
    num_masked: jax.Array
    num_left: jax.Array
    guidance: jax.Array  # float32, weight of (conditional - unconditional)
    token_temperature: jax.Array  # float32
    mask_temperature: jax.Array  # float32


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The static part of a schedule, one compiled sampler per value.

    Attributes:
        segments: tuple of ``reveal.Segment``.
        guided: for each segment, whether any of its steps has a guidance weight.
        greedy: argmax instead of sampling (``token_temperature`` 0).
        noisy_order: whether the confidences carry Gumbel noise.
    """

    segments: tuple[reveal.Segment, ...]
    guided: tuple[bool, ...]
    greedy: bool
    noisy_order: bool


def make_schedule(settings, model):
    """Schedule of ``settings`` for a model: ``(Plan, StepInputs)``; host arithmetic only."""
    t = settings.num_steps
    steps = reveal.sampling_steps(model.num_tokens, t, model.reuse)
    cost = functools.partial(_window_cost, costs.dims_of(model))
    segments = reveal.cut_segments(steps, settings.num_segments or min(t, MAX_BODIES), cost)
    s = np.arange(t)
    remaining = 1 - (s + 1) / t
    guidance = settings.guidance_weights()
    inputs = StepInputs(
        s.astype(np.int32),
        *(x.astype(np.int32) for x in steps),
        guidance.astype(np.float32),
        np.maximum(settings.token_temperature * remaining, 1e-3).astype(np.float32),
        (settings.mask_temperature * remaining).astype(np.float32),
    )
    guided = tuple(bool(guidance[x.start : x.stop].any()) for x in segments)
    return (
        Schedule(
            segments,
            guided,
            settings.token_temperature == 0,
            settings.mask_temperature > 0,
        ),
        inputs,
    )


def _window_cost(dims, windows):
    return costs.step_cost(dims, *windows)


def make(model, settings):
    """A jitted sampler ``(params, labels, image_index, key) -> tokens``.

    labels: int32 [b], ``num_classes`` for no class. image_index: int32 [b], which image of the
    seed each row is: an image depends on (key, index, label) alone, not on its batch. key: typed
    key of the seed. Returns int32 tokens [b, l] in raster order, 0 <= token < v.

    Samplers that differ in guidance or temperatures only share one compilation.
    """
    static, inputs = make_schedule(settings, model)

    def sample(params, labels, image_index, key):
        return sample_tokens(model, static, inputs, params, labels, image_index, key)

    return sample


@functools.partial(jax.jit, static_argnames=("model", "static"))
def sample_tokens(model, static, inputs, params, labels, image_index, key):
    """Tokens of a batch of images; see ``make``. ``static``, ``inputs``: from ``make_schedule``."""
    order, ids, _ = _run(model, static, inputs, params, labels, image_index, key, trace=False)
    return _in_raster_order(order, ids)


class Trace(NamedTuple):
    """What the sampler knows after each step, all in raster order.

    Attributes:
        tokens: int32 [t, b, l]; of a masked place the step's guess. The last are the result.
        visible: bool [t, b, l], the places revealed so far, those of the step included.
    """

    tokens: jax.Array
    visible: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "static"))
def trace_tokens(model, static, inputs, params, labels, image_index, key):
    """As ``sample_tokens``, but what every step leaves: a ``Trace``."""
    *_, (order, ids) = _run(model, static, inputs, params, labels, image_index, key, trace=True)
    num_visible = order.shape[-1] - inputs.num_left
    visible = jnp.arange(order.shape[-1]) < jnp.reshape(num_visible, (-1, 1, 1))
    return Trace(
        _in_raster_order(order, ids),
        _in_raster_order(order, jnp.broadcast_to(visible, order.shape)),
    )


def _in_raster_order(order, values):
    """[..., l] in reveal order to raster order."""
    return jnp.take_along_axis(values, jnp.argsort(order, axis=-1), axis=-1)


def _run(model, static, inputs, params, labels, image_index, key, trace):
    """All steps: final (order, ids) [b, l], and with ``trace`` both after each step [t, b, l]."""
    b, l = labels.shape[0], model.num_tokens  # noqa: E741
    apply = functools.partial(model.apply, {"params": params})
    guided = any(static.guided)
    modulation = apply(labels, method="condition")
    if guided:
        null = apply(jnp.array([model.num_classes]), method="condition")
        null = jnp.broadcast_to(null, modulation.shape)
        modulation = interleave(modulation, null, axis=1)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, image_index)
    order = jnp.broadcast_to(jnp.arange(l, dtype=jnp.int32), (b, l))
    cache = jnp.zeros((b * (1 + guided), 0, model.width), jnp.dtype(model.dtype))
    carry, steps = (order, jnp.zeros((b, l), jnp.int32), cache), []
    for i, segment in enumerate(static.segments):
        order, ids, cache = carry
        if guided and not any(static.guided[i:]):  # the null rows have served
            guided, modulation, cache = False, modulation[:, ::2], cache[::2]
        windows = segment.windows
        room = windows.num_cached + windows.num_new
        cache = jnp.pad(cache, ((0, 0), (0, max(0, room - cache.shape[1])), (0, 0)))[:, :room]
        body = functools.partial(
            _step,
            apply,
            static,
            exact=segment.stop - segment.start == 1,
            windows=windows,
            branches=(1 + guided, 1 + static.guided[i]),
            modulation=modulation,
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


def interleave(conditional, unconditional, axis=0):
    """Put the two guidance branches of each row side by side: 2b rows c0 u0 c1 u1 ...

    Side by side, not one after the other, so that a sharded batch stays where it is.
    """
    both = jnp.stack([conditional, unconditional], axis=axis + 1)
    return both.reshape(*both.shape[:axis], -1, *both.shape[axis + 2 :])


def _step(apply, static, carry, step, *, exact, windows, branches, modulation, keys, trace):
    """One sampling step: encode the new tokens, predict the masked, reveal the most confident.

    ``branches``: guidance branches of the cache and of the decoder, 1 or 2 each. Returns the new
    carry, and with ``trace`` its (order, ids).
    """
    order, ids, cache = carry
    cached_branches, decoded_branches = branches
    # In an exact step every slot of every window is real and nothing needs a mask.
    count = (lambda x: None) if exact else (lambda x: x)
    num_visible = step.num_cached + step.num_new

    new = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=step.num_cached, slice_size=windows.num_new
    )
    # Spare slots at the end: the slice never clamps, however small the step.
    spare = ((0, 0), (0, windows.num_new))
    new_ids, new_positions = (new(jnp.pad(x, spare), axis=1) for x in (ids, order))
    cache = apply(
        *(jnp.repeat(x, cached_branches, axis=0) for x in (new_ids, new_positions)),
        modulation,
        cache[:, : windows.num_cached],
        num_new=count(step.num_new),
        num_cached=count(step.num_cached),
        method="encode",
    )
    first = order.shape[1] - windows.num_masked
    positions = order[:, first:]
    skip = cached_branches // decoded_branches  # 2: the unconditional rows are not decoded
    logits = apply(
        jnp.repeat(positions, decoded_branches, axis=0),
        modulation[:, ::skip],
        cache[::skip, : windows.num_visible],
        num_masked=count(step.num_masked),
        num_visible=count(num_visible),
        method="decode",
    )
    if decoded_branches == 2:
        conditional, unconditional = logits[0::2], logits[1::2]
        logits = conditional + step.guidance * (conditional - unconditional)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    tokens, confidence = _choose(static, step, log_probs, positions, keys)

    # The masked window is a suffix; its padding comes first and, at +inf under a stable sort,
    # stays there. What is most confident moves to the front and so is revealed next.
    real = jnp.arange(windows.num_masked) >= windows.num_masked - step.num_masked
    confidence = jnp.where(real, confidence, jnp.inf)
    tokens = jnp.where(real, tokens, ids[:, first:])
    rank = jnp.argsort(confidence, axis=1, stable=True, descending=True)

    def reveal_next(old, suffix):
        return jnp.concatenate([old[:, :first], jnp.take_along_axis(suffix, rank, axis=1)], axis=1)

    order, ids = reveal_next(order, positions), reveal_next(ids, tokens)
    return (order, ids, cache), (order, ids) if trace else None


def _choose(static, step, log_probs, positions, keys):
    """Sample a token for each masked position, and the confidence that decides the order.

    log_probs float32 [b, m, v], positions int32 [b, m], keys [b] (one key an image). Returns
    int32 and float32 [b, m].
    """
    # One key for each (image, step, raster position), so noise knows nothing of windows.
    fold = jax.random.fold_in
    at = jax.vmap(lambda key, row: jax.vmap(lambda p: fold(fold(key, step.index), p))(row))
    noise_keys = None if static.greedy and not static.noisy_order else at(keys, positions)
    gumbel = lambda shape, stream: jax.vmap(  # noqa: E731
        jax.vmap(lambda key: jax.random.gumbel(fold(key, stream), shape))
    )(noise_keys)
    scores = log_probs
    if not static.greedy:
        scores = log_probs / step.token_temperature + gumbel(log_probs.shape[-1:], 0)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    confidence = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    if static.noisy_order:
        confidence = confidence + step.mask_temperature * gumbel((), 1)
    return tokens, confidence
