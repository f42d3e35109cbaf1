"""Reveal order: mask schedules, windows and training splits.

Every sequence is written in the order in which its tokens become visible, so that the cached, the
newly revealed and the masked tokens of any step are contiguous windows:

    order:   [ 0 ....... n_prev | n_prev ....... n_vis | n_vis ............ l ]
                cached               newly revealed          masked

Everything here is host arithmetic in float64 on numpy values: schedules and shapes are static.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import special


def mask_counts(num_tokens, num_steps):
    """Masked tokens before each step: ``floor(l cos(pi s / 2t))`` (paper Section 3, reference).

    Args:
        num_tokens: l, at least 1.
        num_steps: t, at least 1.

    Returns:
        int64 [t + 1], from l (nothing visible) down to 0 (all visible), never increasing.

    Raises:
        ValueError: an argument is below 1.
    """
    if num_tokens < 1 or num_steps < 1:
        raise ValueError(f"{num_tokens=} and {num_steps=} must both be at least 1")
    ratio = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    counts = np.floor(num_tokens * np.cos(ratio * np.pi / 2)).astype(np.int64)
    counts[0], counts[-1] = num_tokens, 0
    return counts


class StepCounts(NamedTuple):
    """Token counts of the sampling steps, int64 [t] each."""

    num_cached: np.ndarray  # visible before the step, features kept from earlier steps
    num_new: np.ndarray  # encoded in this step
    num_masked: np.ndarray  # decoded in this step
    num_left: np.ndarray  # still masked after this step

    @property
    def num_visible(self):
        return self.num_cached + self.num_new


def sampling_steps(num_tokens, num_steps, reuse=True):
    """Token counts of every sampling step; without reuse all visible tokens are encoded anew."""
    counts = mask_counts(num_tokens, num_steps)
    visible = num_tokens - counts[:-1]
    cached = np.concatenate([[0], visible[:-1]]) if reuse else np.zeros_like(visible)
    return StepCounts(cached, visible - cached, counts[:-1], counts[1:])


class Windows(NamedTuple):
    """Static window sizes of one compiled shape; all are upper bounds of the true counts."""

    num_cached: int
    num_new: int
    num_visible: int
    num_masked: int


class Segment(NamedTuple):
    """Contiguous sampling steps ``start <= s < stop`` that share one set of window sizes."""

    start: int
    stop: int
    windows: Windows


def _cover(steps, start, stop):
    """The smallest windows in which all steps ``start <= s < stop`` fit."""
    part = [np.asarray(x[start:stop]) for x in (*steps, steps.num_visible)]
    cached, new, masked, _, visible = part
    return Windows(*(int(x.max()) for x in (cached, new, visible, masked)))


def _covers_from(steps, start):
    """``_cover`` of all runs from ``start``, as ``Windows`` of int [t - start] arrays."""
    sizes = (steps.num_cached, steps.num_new, steps.num_visible, steps.num_masked)
    return Windows(*(np.maximum.accumulate(np.asarray(x)[start:]) for x in sizes))


def cut_segments(steps, num_segments, cost):
    """Cut the sampling steps into runs such that the padded work is least.

    Args:
        steps: ``StepCounts`` of t steps.
        num_segments: how many runs; more than t means t. One run compiles one body that pays
            for the largest step every time, t runs pay exactly and compile t bodies.
        cost: ``cost(windows) -> float``, work of one step with these window sizes; elementwise,
            for ``Windows`` of int arrays.

    Returns:
        tuple of ``Segment``, in order.

    Raises:
        ValueError: ``num_segments`` is below 1.
    """
    if num_segments < 1:
        raise ValueError(f"{num_segments=} must be at least 1")
    t = len(steps.num_masked)
    num_segments = min(num_segments, t)
    work = np.full((t + 1, t + 1), np.inf)
    for i in range(t):
        work[i, i + 1 :] = np.arange(1, t - i + 1) * cost(_covers_from(steps, i))
    _, ends = best_partition(work, num_segments)
    starts = [0, *ends[:-1]]
    return tuple(Segment(i, j, _cover(steps, i, j)) for i, j in zip(starts, ends, strict=True))


def best_partition(work, num_parts):
    """Least total of ``work[i, j]`` over a partition of 0..t into ``num_parts`` runs.

    Returns the total and the list of the runs' ends.
    """
    size = len(work)
    best = np.full((num_parts + 1, size), np.inf)
    best[0, 0] = 0.0
    came_from = np.zeros((num_parts + 1, size), int)
    for k in range(1, num_parts + 1):
        total = best[k - 1][:, None] + work
        came_from[k] = total.argmin(axis=0)
        best[k] = total.min(axis=0)
    ends = [size - 1]
    for k in range(num_parts, 1, -1):
        ends.append(int(came_from[k, ends[-1]]))
    return best[num_parts, -1], ends[::-1]


# --- training splits ------------------------------------------------------------------------


class Split(NamedTuple):
    """Counts of one training step: ``n_prev`` tokens cached, ``n_vis`` visible, the rest masked."""

    reuse: bool
    num_cached: int
    num_visible: int


@dataclasses.dataclass(frozen=True)
class SplitDistribution:
    """The distribution of training splits (paper Section 4.2, reference; method Section 4).

    Attributes:
        mask_ratio: "beta": r ~ Beta(alpha, beta), the paper; "cosine": r = cos(pi u / 2) with
            u ~ U(0, 1), MaskGIT's, which shows a small grid all the ratios that sampling uses.
        alpha, beta: of the Beta distribution; the paper has 12 and 3.
        min_visible: fewest visible tokens; 1 in the reference. 0 trains the fully masked case,
            the first step of sampling, too.
        reuse_probability: share of steps that reuse features of the EMA model; 0.5 in the paper.
    """

    mask_ratio: str = "beta"
    alpha: float = 12.0
    beta: float = 3.0
    min_visible: int = 1
    reuse_probability: float = 0.5

    def __post_init__(self):
        if self.mask_ratio not in ("beta", "cosine"):
            raise ValueError(f"{self.mask_ratio=} is neither 'beta' nor 'cosine'")
        if not 0 <= self.reuse_probability <= 1:
            raise ValueError(f"{self.reuse_probability=} is not a probability")
        if not (self.alpha > 0 and self.beta > 0):
            raise ValueError(f"alpha={self.alpha} and beta={self.beta} must be positive")
        if self.min_visible not in (0, 1):
            raise ValueError(f"{self.min_visible=} is neither 0 nor 1")

    def draw(self, num_tokens, seed, step):
        """The split of one training step, a function of (seed, step) alone.

        Every host draws it for itself and gets the same. ``n_masked = clip(round(l r), 1,
        l - min_visible)``; with reuse ``n_prev = n_vis - round(n_vis u)``; rounding half to even.
        """
        generator = np.random.Generator(np.random.Philox(key=[seed, step]))
        # Always four draws in this order, so that one setting never shifts another's numbers.
        uniforms = generator.random(3)
        if self.mask_ratio == "beta":
            ratio = generator.beta(self.alpha, self.beta)
        else:
            ratio = np.cos(np.pi * uniforms[0] / 2)
        masked = int(np.clip(np.rint(num_tokens * ratio), 1, num_tokens - self.min_visible))
        visible = num_tokens - masked
        if uniforms[1] >= self.reuse_probability:
            return Split(False, 0, visible)
        return Split(True, visible - int(np.rint(visible * uniforms[2])), visible)

    def visible_probabilities(self, num_tokens):
        """Probability of each number of visible tokens, float64 [l + 1]."""
        edge = (np.arange(num_tokens + 2) - 0.5) / num_tokens
        edge = np.clip(edge, 0.0, 1.0)
        if self.mask_ratio == "beta":
            cdf = special.betainc(self.alpha, self.beta, edge)
        else:
            cdf = 1 - np.arccos(edge) * 2 / np.pi
        masked = np.diff(cdf)
        masked[1] += masked[0]
        masked[0] = 0.0
        if self.min_visible:
            masked[-2] += masked[-1]
            masked[-1] = 0.0
        return masked[::-1]

    def cached_probabilities(self, num_visible):
        """Given reuse, probability of each number of cached tokens, float64 [n_vis + 1]."""
        if num_visible == 0:
            return np.ones(1)
        mass = np.full(num_visible + 1, 1.0 / num_visible)
        mass[[0, -1]] /= 2
        return mass
