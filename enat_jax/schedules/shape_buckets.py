"""Shape buckets of training: the few window sizes that all training splits are padded to.

The token counts of a training step vary and XLA wants static shapes, so steps share buckets, which
are chosen to pad least in expectation. Host arithmetic in float64, as in ``reveal``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from enat_jax.schedules import reveal

Range = tuple[int, int]  # first and last of some counts, both included

# Candidate bounds of buckets; candidate bounds and parts of the cached counts within a bucket.
_MAX_BOUNDS = 40
_MAX_CACHED_BOUNDS = 24
_MAX_PARTS = 6


class Bucket(NamedTuple):
    """Splits that run in one compiled shape.

    Attributes:
        reuse: whether they reuse features.
        visible: range of their visible counts.
        cached: range of their cached counts; (0, 0) without reuse.
        windows: the sizes that hold all of them.
    """

    reuse: bool
    visible: Range
    cached: Range
    windows: reveal.Windows

    def holds(self, split: reveal.Split) -> bool:
        """Returns whether a split belongs to this bucket."""
        return (
            self.reuse == split.reuse
            and self.visible[0] <= split.num_visible <= self.visible[1]
            and self.cached[0] <= split.num_cached <= self.cached[1]
        )


def _bucket(num_tokens: int, multiple: int, reuse: bool, visible: Range, cached: Range) -> Bucket:
    (low, high), (first, last) = visible, cached
    last = min(last, high)
    sizes = (last, high - first, high, num_tokens - low)
    rounded = (min(-(-size // multiple) * multiple, num_tokens) for size in sizes)
    return Bucket(reuse, visible, (first, last), reveal.Windows(*rounded))


def find(buckets: Sequence[Bucket], split: reveal.Split) -> Bucket:
    """Returns the bucket of a split.

    Raises:
        ValueError: no bucket holds it; the buckets belong to another distribution.
    """
    for bucket in buckets:
        if bucket.holds(split):
            return bucket
    raise ValueError(f"no bucket holds {split}: these buckets belong to another distribution")


def choose(
    num_tokens: int,
    splits: reveal.SplitDistribution,
    max_shapes: int,
    cost: reveal.Cost,
    multiple: int = 1,
) -> tuple[Bucket, ...]:
    """Chooses buckets that cover every split with little expected padded work.

    Steps without reuse need no cache window and no EMA pass, so they are buckets of their own.
    The rest is cut by the visible count first and, within each range, by the cached count; both
    cuts and the share of shapes for each are chosen together by dynamic programming.

    Args:
        num_tokens: l.
        splits: the distribution.
        max_shapes: most buckets; at least 1 without reuse or with reuse only, else at least 2.
        cost: the work of one step, such as ``costs.training_cost``.
        multiple: windows have sizes that it divides, or l: those of the choice, rounded up.

    Raises:
        ValueError: ``max_shapes`` is too small.
    """
    q = splits.reuse_probability
    mass = splits.visible_probabilities(num_tokens)
    bounds = _candidate_bounds(mass)
    plain = _covers_without_reuse(num_tokens, mass, bounds, cost, max_shapes)
    reuse = _covers_with_reuse(num_tokens, splits, mass, bounds, cost, max_shapes)
    if q in (0, 1):
        num_plain = max_shapes if q == 0 else 0
    elif max_shapes < 2:
        raise ValueError(f"{max_shapes=} must be at least 2 when some steps reuse features")
    else:
        works = [
            (1 - q) * plain[k].work + q * reuse[max_shapes - k].work for k in range(1, max_shapes)
        ]
        num_plain = 1 + int(np.argmin(works))
    return (
        *(_bucket(num_tokens, multiple, False, *x) for x in plain[num_plain].ranges),
        *(_bucket(num_tokens, multiple, True, *x) for x in reuse[max_shapes - num_plain].ranges),
    )


class _Cover(NamedTuple):
    """Ranges of (visible, cached) counts that cover all splits, with or without reuse.

    Attributes:
        work: expected padded work; infinite if nothing is covered.
        ranges: one pair for each bucket.
    """

    work: float
    ranges: list[tuple[Range, Range]]


_NO_COVER = _Cover(np.inf, [])


def _candidate_bounds(mass: Float[np.ndarray, " l+1"]) -> Int[np.ndarray, " bounds"]:
    """Returns visible counts at which a bucket may end: -1 (before all) to the largest with mass.

    The first is that before the smallest with mass.
    """
    largest = int(np.flatnonzero(mass)[-1])
    smallest = int(np.flatnonzero(mass)[0])
    if largest - smallest < _MAX_BOUNDS:
        return np.arange(smallest - 1, largest + 1)
    # Half of the candidates by probability, half evenly: rare large counts cost most each.
    quantiles = np.searchsorted(np.cumsum(mass), np.linspace(0, 1, _MAX_BOUNDS // 2)[:-1])
    even = np.linspace(smallest - 1, largest, _MAX_BOUNDS // 2).round().astype(int)
    inside = quantiles[(quantiles >= smallest) & (quantiles <= largest)]
    return np.unique(np.concatenate([inside, even]))


def _covers_without_reuse(
    num_tokens: int,
    mass: Float[np.ndarray, " l+1"],
    bounds: Int[np.ndarray, " bounds"],
    cost: reveal.Cost,
    max_shapes: int,
) -> list[_Cover]:
    """Returns the cover of least work for each number of buckets from 0 to ``max_shapes``."""
    size = len(bounds)
    work = np.full((size, size), np.inf)
    below = np.concatenate([[0.0], np.cumsum(mass)])
    for i in range(size):
        for j in range(i + 1, size):
            low, high = bounds[i] + 1, bounds[j]
            probability = below[high + 1] - below[low]
            work[i, j] = probability * cost(0, high, high, num_tokens - low)
    covers = [_NO_COVER]
    for k in range(1, max_shapes + 1):
        total, runs = reveal.best_partition(work, min(k, size - 1))
        visible = [(int(bounds[i]) + 1, int(bounds[j])) for i, j in runs]
        covers.append(_Cover(total, [(x, (0, 0)) for x in visible]))
    return covers


def _covers_with_reuse(
    num_tokens: int,
    splits: reveal.SplitDistribution,
    mass: Float[np.ndarray, " l+1"],
    bounds: Int[np.ndarray, " bounds"],
    cost: reveal.Cost,
    max_shapes: int,
) -> list[_Cover]:
    """Returns a cover of little work for each number of buckets from 0 to ``max_shapes``."""
    size, largest = len(bounds), int(bounds[-1])
    joint = np.zeros((largest + 1, largest + 1))  # visible, cached
    for count in range(largest + 1):
        joint[count, : count + 1] = mass[count] * splits.cached_probabilities(count)
    below = np.pad(joint.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    max_parts = min(_MAX_PARTS, max_shapes)
    # Of the splits between two bounds, cut into k parts by their cached counts.
    work = np.full((max_parts + 1, size, size), np.inf)
    ranges = {}
    for i in range(size):
        for j in range(i + 1, size):
            visible = int(bounds[i]) + 1, int(bounds[j])
            parts = _cut_cached(num_tokens, below, visible, cost, max_parts)
            for k, (total, cached) in enumerate(parts, start=1):
                work[k, i, j], ranges[k, i, j] = total, [(visible, x) for x in cached]
    best = np.full((max_shapes + 1, size), np.inf)
    best[0, 0] = 0.0
    found: dict[tuple[int, int], list[tuple[Range, Range]]] = {(0, 0): []}
    for used in range(1, max_shapes + 1):
        options = np.stack(
            [best[used - k][:, None] + work[k] for k in range(1, min(max_parts, used) + 1)]
        )
        best[used] = options.min(axis=(0, 1))
        for j in np.flatnonzero(np.isfinite(best[used])).tolist():
            option, start = np.unravel_index(options[:, :, j].argmin(), (len(options), size))
            k = int(option) + 1
            found[used, j] = found[used - k, int(start)] + ranges[k, int(start), j]
    covers = [_NO_COVER]
    for k in range(1, max_shapes + 1):
        used = int(best[: k + 1, -1].argmin())
        covers.append(_Cover(best[used, -1], found[used, size - 1]))
    return covers


def _cut_cached(
    num_tokens: int,
    below: Float[np.ndarray, "visible+2 cached+2"],
    visible: Range,
    cost: reveal.Cost,
    max_parts: int,
) -> list[tuple[float, list[Range]]]:
    """Cuts the splits of a range of visible counts into 1, 2, ... parts by their cached counts.

    Args:
        num_tokens: l.
        below: probability of all splits with fewer visible and with fewer cached tokens.
        visible: the range.
        cost: the work of one step.
        max_parts: most parts.

    Returns:
        For each number of parts the expected work and the parts, those of largest counts first.
    """
    low, high = visible
    edges = np.linspace(-1, high, min(high + 2, _MAX_CACHED_BOUNDS)).round().astype(int)
    edges = np.unique(edges)
    first, last = edges[:-1] + 1, edges[1:]
    column = below[high + 1] - below[low]
    probability = column[None, last + 1] - column[first, None]
    part = probability * cost(last[None, :], high - first[:, None], high, num_tokens - low)
    work = np.full((len(edges), len(edges)), np.inf)
    upper = np.triu_indices(len(edges) - 1)
    work[upper[0], upper[1] + 1] = part[upper]
    cuts = reveal.best_partitions(work, min(max_parts, len(edges) - 1))
    return [
        (total, [(int(first[i]), int(last[j - 1])) for i, j in reversed(runs)])
        for total, runs in cuts
    ]
