"""The schedule of the sampler: what each step reveals, in which windows, by which settings.

Host arithmetic: the static part decides what is compiled, the inputs are fed to the scan.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from enat_jax.inference.sampler_settings import Settings
from enat_jax.models.transformers import Transformer
from enat_jax.schedules import costs, reveal

MAX_BODIES = 16  # compiled without being asked for; more cost more time than padding does
# Compiling a body takes as long as so many multiply-adds: measured on two CPU cores, which do them
# in 1 s; assumed of other devices. Constants, so that images do not depend on the machine's load.
BODY_COSTS = {"cpu": 1.5e11}
BODY_COST = 1e15


class StepInputs(NamedTuple):
    """What the scan is fed, one entry a step; the counts as in ``reveal.StepCounts``.

    Attributes:
        step: its number, from 0.
        guidance: weight of (conditional - unconditional).
        token_temperature, mask_temperature: of the step.
        num_projected: cached tokens that were cached before the last step, too, for a model that
            projects them once; None: it projects them at every step.
    """

    step: Int[Array | np.ndarray, " t"]
    num_cached: Int[Array | np.ndarray, "t ..."]
    num_new: Int[Array | np.ndarray, "t ..."]
    num_masked: Int[Array | np.ndarray, "t ..."]
    num_left: Int[Array | np.ndarray, "t ..."]
    guidance: Float[Array | np.ndarray, " t"]
    token_temperature: Float[Array | np.ndarray, " t"]
    mask_temperature: Float[Array | np.ndarray, " t"]
    num_projected: Int[Array | np.ndarray, "t ..."] | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The static part of a schedule; a sampler is compiled for each value.

    Attributes:
        segments: runs of steps that share their window sizes.
        guided: for each segment, whether any of its steps has a guidance weight.
        greedy: argmax instead of sampling (``token_temperature`` 0).
        noisy_order: whether the confidences carry Gumbel noise.
        rank: when each raster position is revealed, by an order that is the same for all images;
            None: by confidence.
        random_order: the noise of the confidences alone decides.
    """

    segments: tuple[reveal.Segment, ...]
    guided: tuple[bool, ...]
    greedy: bool
    noisy_order: bool
    rank: tuple[int, ...] | None = None
    random_order: bool = False


def make(
    settings: Settings,
    model: Transformer,
    num_masked: Int[np.ndarray, " b"] | None = None,
    grid: tuple[int, int] | None = None,
    num_images: int | None = None,
) -> tuple[Schedule, StepInputs]:
    """Returns the schedule of ``settings`` for a model; host arithmetic only.

    Args:
        settings: of the sampler.
        model: the transformer.
        num_masked: tokens to be drawn of each image where others are given, all of one
            ``reveal.masked_range``, for whose numbers there is one schedule. None: all tokens.
        grid: rows and columns of tokens, which Halton's order needs; None: a square.
        num_images: that are going to be drawn; where ``settings`` leave the number of segments
            open, compiling and drawing together then take the least time. None: as many segments
            as steps, but no more than ``MAX_BODIES``.

    Raises:
        ValueError: the numbers are of several ranges, or the settings do not suit the model.
    """
    t = settings.num_steps
    settings.check_counts(model.num_tokens)
    make_steps = functools.partial(
        reveal.sampling_steps, model.num_tokens, t, model.reuse, revealed=settings.counts
    )
    steps = largest = make_steps(num_masked)
    if num_masked is not None:
        numbers = reveal.masked_range(model.num_tokens, int(num_masked[0]))
        if not np.isin(num_masked, numbers).all():
            raise ValueError(f"{num_masked=} must lie within {numbers[0]} and {numbers[-1]}")
        largest = make_steps(numbers)
    s = np.arange(t)
    token_temperature, mask_temperature = settings.temperatures()
    weights = settings.guidance_weights()
    projected = None
    if model.reuse and getattr(model, "project_once", False):
        projected = steps.num_projected.astype(np.int32)
    segments = _segments(settings, costs.dims_of(model), largest, num_images)
    inputs = StepInputs(
        step=s.astype(np.int32),
        **{name: x.astype(np.int32) for name, x in steps._asdict().items()},
        guidance=weights.astype(np.float32),
        token_temperature=np.maximum(token_temperature, 1e-3).astype(np.float32),
        mask_temperature=mask_temperature.astype(np.float32),
        num_projected=projected,
    )
    schedule = Schedule(
        segments,
        guided=_guided(segments, weights),
        greedy=settings.greedy,
        noisy_order=settings.noisy_order,
        rank=_halton_rank(model.num_tokens, grid) if settings.order == "halton" else None,
        random_order=settings.order == "random",
    )
    return schedule, inputs


def _guided(
    segments: tuple[reveal.Segment, ...], weights: Float[np.ndarray, " t"]
) -> tuple[bool, ...]:
    return tuple(bool(weights[x.start : x.stop].any()) for x in segments)


def _segments(
    settings: Settings, dims: costs.Dims, steps: reveal.StepCounts, num_images: int | None
) -> tuple[reveal.Segment, ...]:
    """Cuts the steps into as many segments as are asked for, or else as cost the least time."""
    cost = functools.partial(costs.step_cost, costs.keeping_text(dims))
    if settings.num_segments is not None or num_images is None:
        return reveal.cut_segments(steps, settings.num_segments or MAX_BODIES, cost)
    body = BODY_COSTS.get(jax.default_backend(), BODY_COST)
    weights = settings.guidance_weights()

    def time_of(segments: tuple[reveal.Segment, ...]) -> float:
        work = costs.padded_sampling_cost(dims, segments, _guided(segments, weights))
        return body * len(segments) + num_images * work

    return min(reveal.every_cut(steps, MAX_BODIES, cost), key=time_of)


def _halton_rank(num_tokens: int, grid: tuple[int, int] | None) -> tuple[int, ...]:
    rows, columns = grid or (math.isqrt(num_tokens),) * 2
    if rows * columns != num_tokens:
        raise ValueError(
            f"order='halton' needs the grid of the {num_tokens} tokens, and {rows} x {columns} are "
            "not as many: give the rows and columns as grid"
        )
    return tuple(np.argsort(reveal.halton_order(rows, columns)).tolist())
