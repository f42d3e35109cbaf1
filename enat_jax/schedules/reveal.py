"""Reveal order: mask schedules, windows and training splits.

Every sequence is written in the order in which its tokens become visible, so that the cached, the
newly revealed and the masked tokens of any step are contiguous windows:

    order:   [ 0 ....... n_prev | n_prev ....... n_vis | n_vis ............ l ]
                cached               newly revealed          masked

Everything here is host arithmetic in float64 on numpy values: schedules and shapes are static.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

MAX_REVEALS = 8  # that a training step computes one after the other
MASKED_RANGES = 3  # of images that keep some of their tokens
Size = int | Int[np.ndarray, "..."]
# The work of one step in windows of given sizes: (num_cached, num_new, num_visible, num_masked),
# as in ``Windows``; elementwise for arrays, which broadcast.
Cost = Callable[[Size, Size, Size, Size], np.ndarray]


def mask_counts(
    num_tokens: Size, num_steps: int, revealed: Sequence[int] | None = None
) -> Int[np.ndarray, "t+1 ..."]:
    """Returns the masked tokens before each step: ``floor(l cos(pi s / 2t))``.

    The cosine schedule of the paper (Section 3) in the float64 arithmetic of the reference.

    Args:
        num_tokens: l, at least 1; or of several images, [b], those that are masked at first.
        num_steps: t, at least 1.
        revealed: tokens revealed in each step, [t], in place of the cosine schedule; where
            ``num_tokens`` is another number than their sum, they apply in proportion.

    Returns:
        int64, from l (nothing visible) down to 0 (all visible), never increasing.

    Raises:
        ValueError: an argument is below 1.
    """
    if np.min(num_tokens) < 1 or num_steps < 1:
        raise ValueError(f"{num_tokens=} and {num_steps=} must both be at least 1")
    if revealed is not None:
        left = sum(revealed) - np.cumsum([0, *revealed])
        return np.multiply.outer(left, np.asarray(num_tokens, np.int64)) // sum(revealed)
    ratio = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    cosine = np.cos(ratio * np.pi / 2).reshape(-1, *(1,) * np.ndim(num_tokens))
    counts = np.floor(num_tokens * cosine).astype(np.int64)
    counts[0], counts[-1] = num_tokens, 0
    return counts


class StepCounts(NamedTuple):
    """Token counts of the sampling steps, int64; [t], or [t, b] where images differ.

    Attributes:
        num_cached: visible before the step, with features kept from earlier steps.
        num_new: encoded in the step.
        num_masked: decoded in the step.
        num_left: still masked after the step.
    """

    num_cached: Int[np.ndarray, "t ..."]
    num_new: Int[np.ndarray, "t ..."]
    num_masked: Int[np.ndarray, "t ..."]
    num_left: Int[np.ndarray, "t ..."]

    @property
    def num_visible(self) -> Int[np.ndarray, "t ..."]:
        """The context of the decoder in the step."""
        return self.num_cached + self.num_new

    @property
    def num_projected(self) -> Int[np.ndarray, "t ..."]:
        """Of the cached tokens those that were cached in the step before, too."""
        return np.concatenate([np.zeros_like(self.num_cached[:1]), self.num_cached[:-1]])

    @property
    def sizes(self) -> tuple[Int[np.ndarray, " t"], ...]:
        """The sizes of the windows that the largest image needs, in the order of ``Windows``."""
        counts = self.num_cached, self.num_new, self.num_visible, self.num_masked
        return tuple(x.reshape(len(x), -1).max(axis=1) for x in counts)


def sampling_steps(
    num_tokens: int,
    num_steps: int,
    reuse: bool = True,
    num_masked: Int[np.ndarray, " b"] | None = None,
    revealed: Sequence[int] | None = None,
) -> StepCounts:
    """Returns the token counts of every sampling step.

    Args:
        num_tokens: l, at least 1.
        num_steps: t, at least 1.
        reuse: whether features of earlier steps are kept; without, all visible tokens are encoded
            anew in every step.
        num_masked: of each image, 1 <= num_masked <= l, where the others are given and so are
            revealed in the first step; None: all tokens are masked.
        revealed: tokens revealed in each step in place of the cosine schedule, see
            ``mask_counts``.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_masked is not None and np.max(num_masked) > num_tokens:
        raise ValueError(f"{num_masked=} must be at most {num_tokens=}")
    counts = mask_counts(num_tokens if num_masked is None else num_masked, num_steps, revealed)
    visible = num_tokens - counts[:-1]
    cached = np.zeros_like(visible)
    if reuse:
        cached[1:] = visible[:-1]
    return StepCounts(cached, visible - cached, counts[:-1], counts[1:])


def halton_order(rows: int, columns: int) -> Int[np.ndarray, " l"]:
    """Returns the raster positions of a grid in the order in which Halton's sequence visits them.

    Point i = 1, 2, ... lies at the radical inverses of i, in base 2 along the rows and in base 3
    along the columns; a cell takes the place of its first point (arXiv 2503.17076). What is
    revealed together is so spread over the image.

    Args:
        rows, columns: of the grid, at least 1 each.

    Returns:
        int64, a permutation of 0 ... rows * columns - 1.
    """
    num_points = 4 * rows * columns
    while True:
        index = np.arange(1, num_points + 1)
        cells = _halton_cells(index, 2, rows) * columns + _halton_cells(index, 3, columns)
        found, first = np.unique(cells, return_index=True)
        if len(found) == rows * columns:
            return cells[np.sort(first)]
        num_points *= 2


def _halton_cells(
    index: Int[np.ndarray, " points"], base: int, size: int
) -> Int[np.ndarray, " points"]:
    """Returns in which of ``size`` cells of [0, 1) the radical inverse of each index lies."""
    inverse, power = np.zeros_like(index), 1
    while index.any():
        index, digit = np.divmod(index, base)
        inverse, power = inverse * base + digit, power * base
    return inverse * size // power  # in whole numbers, as points lie on the edges of cells


def masked_range(num_tokens: int, num_masked: int) -> Int[np.ndarray, " numbers"]:
    """Returns the numbers of masked tokens that share their compiled shapes with ``num_masked``.

    They are a third of 1 to l - 1, and l alone: an image keeps its shapes, whatever its batch, and
    four shapes serve all masks.

    Args:
        num_tokens: l.
        num_masked: 1 <= num_masked <= l.
    """
    bounds = [
        *(i * (num_tokens - 1) // MASKED_RANGES for i in range(MASKED_RANGES + 1)),
        num_tokens,
    ]
    last = next((i for i, bound in enumerate(bounds) if num_masked <= bound), len(bounds) - 1)
    return np.arange(bounds[last - 1] + 1, bounds[last] + 1)


class Windows(NamedTuple):
    """Static window sizes of one compiled shape; all are upper bounds of the true counts.

    Attributes:
        num_cached: the encoder's context.
        num_new: the encoder's input.
        num_visible: the decoder's context.
        num_masked: the decoder's input.
    """

    num_cached: int
    num_new: int
    num_visible: int
    num_masked: int


class Segment(NamedTuple):
    """Contiguous sampling steps ``start <= s < stop`` that share one set of window sizes."""

    start: int
    stop: int
    windows: Windows


def _cover(sizes: tuple[Int[np.ndarray, " t"], ...], start: int, stop: int) -> Windows:
    """Returns the smallest windows in which all steps ``start <= s < stop`` fit."""
    return Windows(*(int(x[start:stop].max()) for x in sizes))


def cut_segments(steps: StepCounts, num_segments: int, cost: Cost) -> tuple[Segment, ...]:
    """Cuts the sampling steps into runs such that the padded work is least.

    Args:
        steps: counts of t steps.
        num_segments: how many runs; more than t means t. One run compiles one body that pays
            for the largest step every time, t runs pay exactly and compile t bodies.
        cost: the work of one step.

    Returns:
        The segments in their order.

    Raises:
        ValueError: ``num_segments`` is below 1.
    """
    return every_cut(steps, num_segments, cost)[-1]


def every_cut(steps: StepCounts, num_segments: int, cost: Cost) -> list[tuple[Segment, ...]]:
    """Returns what ``cut_segments`` does for 1, 2, ... ``num_segments`` runs, but at most t."""
    if num_segments < 1:
        raise ValueError(f"{num_segments=} must be at least 1")
    t, sizes = len(steps.num_masked), steps.sizes
    work = np.full((t + 1, t + 1), np.inf)
    for i in range(t):
        covers = (np.maximum.accumulate(x[i:]) for x in sizes)
        work[i, i + 1 :] = np.arange(1, t - i + 1) * cost(*covers)
    partitions = best_partitions(work, min(num_segments, t))
    return [tuple(Segment(i, j, _cover(sizes, i, j)) for i, j in runs) for _, runs in partitions]


def best_partition(
    work: Float[np.ndarray, "t+1 t+1"], num_parts: int
) -> tuple[float, list[tuple[int, int]]]:
    """Finds the cheapest partition of 0..t into runs, by dynamic programming.

    Args:
        work: ``work[i, j]`` is that of the run ``i <= s < j``; infinite where there is none.
        num_parts: how many runs, from 1 to t.

    Returns:
        The total work, and the runs as pairs (i, j).
    """
    return best_partitions(work, num_parts)[-1]


def best_partitions(
    work: Float[np.ndarray, "t+1 t+1"], num_parts: int
) -> list[tuple[float, list[tuple[int, int]]]]:
    """Returns what ``best_partition`` does for 1, 2, ... ``num_parts`` runs."""
    size = len(work)
    best = np.full((num_parts + 1, size), np.inf)
    best[0, 0] = 0.0
    came_from = np.zeros((num_parts + 1, size), int)
    for k in range(1, num_parts + 1):
        total = best[k - 1][:, None] + work
        came_from[k] = total.argmin(axis=0)
        best[k] = total.min(axis=0)
    found = []
    for parts in range(1, num_parts + 1):
        runs, end = [], size - 1
        for k in range(parts, 0, -1):
            start = int(came_from[k, end])
            runs.append((start, end))
            end = start
        found.append((best[parts, -1], runs[::-1]))
    return found


# --- training splits ------------------------------------------------------------------------


class Split(NamedTuple):
    """Token counts of one training step.

    Attributes:
        reuse: whether the step has a cache of features of the EMA model; it may be empty.
        num_cached: tokens of the cache, 0 without reuse.
        num_visible: cached and newly revealed tokens; the rest is masked.
        earlier: tokens visible after each reveal in which the cache is made, but for the last,
            after which they are ``num_cached``; never decreasing.
    """

    reuse: bool
    num_cached: int
    num_visible: int
    earlier: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class SplitDistribution:
    """The distribution of training splits (the paper, Section 4.2, and the reference).

    Attributes:
        mask_ratio: "beta": r ~ Beta(alpha, beta), the paper; "cosine": r = cos(pi u / 2) with
            u ~ U(0, 1), MaskGIT's, which shows a small grid all the ratios that sampling uses.
        alpha: of the Beta distribution, 12 in the paper.
        beta: of the Beta distribution, 3 in the paper.
        min_visible: fewest visible tokens; 1 in the reference. 0 trains the fully masked case,
            the first step of sampling, too.
        reuse_probability: share of steps that reuse features of the EMA model; 0.5 in the paper.
        reveals: most reveals in which the cache of such a step is made, as the sampler makes it;
            there are 1 to so many, as often each. 1, the paper's: all of its tokens are encoded
            together, and have passed through the projection f once at most.
    """

    mask_ratio: str = "beta"
    alpha: float = 12.0
    beta: float = 3.0
    min_visible: int = 1
    reuse_probability: float = 0.5
    reveals: int = 1

    def __post_init__(self) -> None:
        if self.mask_ratio not in ("beta", "cosine"):
            raise ValueError(f"{self.mask_ratio=} is neither 'beta' nor 'cosine'")
        if not 0 <= self.reuse_probability <= 1:
            raise ValueError(f"{self.reuse_probability=} is not a probability")
        if not (self.alpha > 0 and self.beta > 0):
            raise ValueError(f"alpha={self.alpha} and beta={self.beta} must be positive")
        if self.min_visible not in (0, 1):
            raise ValueError(f"{self.min_visible=} is neither 0 nor 1")
        if not 1 <= self.reveals <= MAX_REVEALS:
            raise ValueError(f"{self.reveals=} is not a number from 1 to {MAX_REVEALS}")
        if self.reveals > 1 and not self.reuse_probability:
            raise ValueError(f"{self.reveals=} has no effect with reuse_probability=0: leave it 1")

    def draw(self, num_tokens: int, seed: int, step: int) -> Split:
        """Draws the split of one training step, a function of (seed, step) alone.

        Every host draws it for itself and gets the same. ``num_masked = clip(round(l r), 1,
        l - min_visible)``; with reuse ``num_cached = num_visible - round(num_visible u)``, where
        u ~ U(0, 1); halves are rounded to even, as in the reference. Reveals that make the cache
        end at ``round(num_cached u_i)``, u_i ~ U(0, 1); where there are fewer than ``reveals``, the
        first reveal nothing.
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
            return Split(False, 0, visible, (0,) * (self.reveals - 1))
        cached = visible - int(np.rint(visible * uniforms[2]))
        if self.reveals == 1:
            return Split(True, cached, visible)
        shares = np.sort(generator.random(self.reveals - 1))
        shares[: generator.integers(self.reveals)] = 0.0
        return Split(True, cached, visible, tuple(np.rint(cached * shares).astype(int).tolist()))

    def visible_probabilities(self, num_tokens: int) -> Float[np.ndarray, " l+1"]:
        """Returns the probability of each number of visible tokens, float64."""
        edge = (np.arange(num_tokens + 2) - 0.5) / num_tokens
        edge = np.clip(edge, 0.0, 1.0)
        if self.mask_ratio == "beta":
            from scipy import special  # late: sampling need not wait for it

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

    def cached_probabilities(self, num_visible: int) -> Float[np.ndarray, " num_visible+1"]:
        """Returns the probability of each number of cached tokens given reuse, float64."""
        if num_visible == 0:
            return np.ones(1)
        mass = np.full(num_visible + 1, 1.0 / num_visible)
        mass[[0, -1]] /= 2
        return mass
