"""Shape buckets of training: the few window sizes that all training splits are padded to.

The token counts of a training step vary and XLA wants static shapes, so steps share buckets, which
are chosen to pad least in expectation. Host arithmetic in float64, as in ``reveal``.
"""

from typing import NamedTuple

import numpy as np

from enat_jax.schedules import reveal


class Bucket(NamedTuple):
    """Splits that run in one compiled shape: with or without reuse, and two ranges of counts."""

    reuse: bool
    visible: tuple[int, int]  # inclusive
    cached: tuple[int, int]  # inclusive
    windows: reveal.Windows

    def holds(self, split):
        return (
            self.reuse == split.reuse
            and self.visible[0] <= split.num_visible <= self.visible[1]
            and self.cached[0] <= split.num_cached <= self.cached[1]
        )


def _bucket(num_tokens, reuse, visible, cached):
    (low, high), (first, last) = visible, cached
    last = min(last, high)
    windows = reveal.Windows(last, high - first, high, num_tokens - low)
    return Bucket(reuse, visible, (first, last), windows)


def find(buckets, split):
    """The bucket of a split.

    Raises:
        ValueError: no bucket holds it; the buckets belong to another distribution.
    """
    for bucket in buckets:
        if bucket.holds(split):
            return bucket
    raise ValueError(f"no bucket holds {split}: these buckets belong to another distribution")


def expected_work(num_tokens, splits, buckets, cost):
    """Expected work of a training step over the distribution of splits.

    Args:
        num_tokens: l; splits: ``reveal.SplitDistribution``; buckets: that hold all its splits.
        cost: as in ``choose``.

    Returns:
        ``(padded, exact)``: in the buckets' windows, and without any padding.
    """
    mass = splits.visible_probabilities(num_tokens)
    padded = exact = 0.0
    for reuse, share in ((False, 1 - splits.reuse_probability), (True, splits.reuse_probability)):
        work = {b: float(cost(*b.windows)) for b in buckets if b.reuse == reuse}
        for visible in np.flatnonzero(mass) if share else ():
            cached = splits.cached_probabilities(visible) if reuse else np.ones(1)
            counts = np.arange(len(cached))
            exact_work = cost(counts, visible - counts, visible, num_tokens - visible)
            padded_work = [
                work[find(buckets, reveal.Split(reuse, int(c), int(visible)))] for c in counts
            ]
            exact += share * mass[visible] * float((cached * exact_work).sum())
            padded += share * mass[visible] * float((cached * padded_work).sum())
    return padded, exact


# Candidate bounds of buckets, and parts of the cached range within one range of visible counts.
_MAX_BOUNDS = 40
_MAX_PARTS = 6


def choose(num_tokens, splits, max_shapes, cost):
    """At most ``max_shapes`` buckets that cover every split with little expected padded work.

    Steps without reuse need no cache window and no EMA pass, so they are buckets of their own.
    The rest is cut by the visible count first and, within each range, by the cached count; both
    cuts and the share of shapes for each are chosen together by dynamic programming.

    Args:
        num_tokens: l.
        splits: ``reveal.SplitDistribution``.
        max_shapes: at least 1 without reuse or with reuse only, else at least 2.
        cost: ``cost(num_cached, num_new, num_visible, num_masked) -> work``, accepting
            arrays; see ``costs.training_cost``.

    Returns:
        tuple of ``Bucket``.

    Raises:
        ValueError: ``max_shapes`` is too small.
    """
    q = splits.reuse_probability
    mass = splits.visible_probabilities(num_tokens)
    bounds = _candidate_bounds(mass)
    plain, plain_cuts = _plain_work(num_tokens, mass, bounds, cost, max_shapes)
    reuse, reuse_cuts = _reuse_work(num_tokens, splits, mass, bounds, cost, max_shapes)
    if q in (0, 1):
        plain_share = max_shapes if q == 0 else 0
    else:
        if max_shapes < 2:
            raise ValueError(f"{max_shapes=} must be at least 2 when some steps reuse features")
        totals = [(1 - q) * plain[k] + q * reuse[max_shapes - k] for k in range(1, max_shapes)]
        plain_share = 1 + int(np.argmin(totals))
    buckets = []
    if plain_share:
        buckets += [
            _bucket(num_tokens, False, visible, (0, 0)) for visible in plain_cuts(plain_share)
        ]
    if plain_share < max_shapes:
        buckets += [
            _bucket(num_tokens, True, visible, cached)
            for visible, cached in reuse_cuts(max_shapes - plain_share)
        ]
    return tuple(buckets)


def _candidate_bounds(mass):
    """Visible counts at which a bucket may end: -1 (before all), ..., the largest with mass."""
    largest = int(np.flatnonzero(mass)[-1])
    smallest = int(np.flatnonzero(mass)[0])
    if largest - smallest < _MAX_BOUNDS:
        return np.arange(smallest - 1, largest + 1)
    # Half of the candidates by probability, half evenly: rare large counts cost most each.
    quantiles = np.searchsorted(np.cumsum(mass), np.linspace(0, 1, _MAX_BOUNDS // 2)[:-1])
    even = np.linspace(smallest - 1, largest, _MAX_BOUNDS // 2).round().astype(int)
    inside = quantiles[(quantiles >= smallest) & (quantiles <= largest)]
    return np.unique(np.concatenate([inside, even]))


def _plain_work(num_tokens, mass, bounds, cost, max_shapes):
    """Least expected work of steps without reuse by number of buckets, and how to get the cuts."""
    size = len(bounds)
    work = np.full((size, size), np.inf)
    below = np.concatenate([[0.0], np.cumsum(mass)])
    for i in range(size):
        for j in range(i + 1, size):
            low, high = bounds[i] + 1, bounds[j]
            probability = below[high + 1] - below[low]
            work[i, j] = probability * cost(0, high, high, num_tokens - low)
    totals = [np.inf] + [
        reveal.best_partition(work, min(k, size - 1))[0] for k in range(1, max_shapes + 1)
    ]

    def cuts(k):
        ends = reveal.best_partition(work, min(k, size - 1))[1]
        starts = [0, *ends[:-1]]
        return [(int(bounds[i]) + 1, int(bounds[j])) for i, j in zip(starts, ends, strict=True)]

    return totals, cuts


def _reuse_work(num_tokens, splits, mass, bounds, cost, max_shapes):
    """As ``_plain_work`` for the steps with reuse, whose buckets are ranges of two counts."""
    size = len(bounds)
    largest = int(bounds[-1])
    joint = np.zeros((largest + 1, largest + 1))  # visible, cached
    for visible in range(largest + 1):
        joint[visible, : visible + 1] = mass[visible] * splits.cached_probabilities(visible)
    below = np.pad(joint.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    parts = min(_MAX_PARTS, max_shapes)
    work = np.full((parts + 1, size, size), np.inf)
    inner = {}
    for i in range(size):
        for j in range(i + 1, size):
            low, high = int(bounds[i]) + 1, int(bounds[j])
            edges = np.unique(np.linspace(-1, high, min(high + 2, 24)).round().astype(int))
            first, last = edges[:-1] + 1, edges[1:]
            column = below[high + 1] - below[low]
            probability = column[None, last + 1] - column[first, None]
            part = probability * cost(last[None, :], high - first[:, None], high, num_tokens - low)
            table = np.full((len(edges), len(edges)), np.inf)
            upper = np.triu_indices(len(edges) - 1)
            table[upper[0], upper[1] + 1] = part[upper]
            for k in range(1, min(parts, len(edges) - 1) + 1):
                work[k, i, j], ends = reveal.best_partition(table, k)
                inner[k, i, j] = list(edges[ends])
    best = np.full((max_shapes + 1, size), np.inf)
    best[0, 0] = 0.0
    choice = {}
    for used in range(1, max_shapes + 1):
        options = [best[used - k][:, None] + work[k] for k in range(1, min(parts, used) + 1)]
        options = np.stack(options)
        best[used] = options.min(axis=(0, 1))
        for j in range(1, size):
            k, i = np.unravel_index(options[:, :, j].argmin(), (len(options), size))
            choice[used, j] = int(k) + 1, int(i)
    totals = np.minimum.accumulate(best[:, -1])

    def cuts(shapes):
        used, j, found = int(best[: shapes + 1, -1].argmin()), size - 1, []
        while j:
            k, i = choice[used, j]
            visible = int(bounds[i]) + 1, int(bounds[j])
            first = 0
            for last in inner[k, i, j]:
                found.append((visible, (first, int(last))))
                first = int(last) + 1
            used, j = used - k, i
        return found[::-1]

    return totals, cuts
