"""The Grain pipeline: an endless, exactly resumable stream of shuffled batches.

The position in the stream is the step and nothing else. The order of an epoch depends on
(seed, epoch) alone, so a run is resumed by ``start_step``, with any number of workers, and a global
batch is the same however many processes share it.
"""

import collections
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from enat_jax.runtime import exits

Batch = dict[str, np.ndarray]


def shuffled(start: int, count: int, n: int, seed: int) -> np.ndarray:
    """Examples at the places ``start`` to ``start + count`` of an endless row of shuffled epochs.

    Every epoch is a permutation of its own, computed place by place: nothing grows with ``n``.

    Returns int64 [count] in [0, n), 1 <= n <= 2**31.
    """
    out = np.empty(count, np.int64)
    at = 0
    while at < count:
        epoch, place = divmod(start + at, n)
        key = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        for i in range(min(count - at, n - place)):
            out[at + i] = grain.experimental.index_shuffle(
                place + i, max_index=n - 1, seed=key, rounds=4
            )
        at += min(count - at, n - place)
    return out


class _Fetch(grain.transforms.RandomMap):
    """From a step to this process's part of its global batch."""

    def __init__(
        self, gather: Callable[[np.ndarray, np.ndarray], Batch], n: int, size: int, seed: int, part
    ):
        self._gather = gather
        self._n = n
        self._size = size
        self._seed = seed
        self._part = part

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        # Seeds are drawn for the global batch and then cut, or they would depend on the hosts.
        seeds = rng.integers(0, 1 << 63, self._size)[self._part]
        first = int(element) * self._size + self._part.start
        indices = shuffled(first, self._part.stop - self._part.start, self._n, self._seed)
        return self._gather(indices, seeds)


def train_batches(
    gather: Callable[[np.ndarray, np.ndarray], Batch],
    n: int,
    global_batch: int,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yields this process's part of the batches from ``start_step`` on, without end.

    ``gather(indices [b], seeds [b]) -> batch`` fetches examples out of ``n``; each epoch is a new
    shuffle, and an epoch's last examples share a batch with the next one's first. Whole batches are
    fetched, which is many times faster than single examples. With ``workers`` it is done by that
    many other processes (``gather`` must be picklable), without by a thread; the batches are the
    same.

    Raises ValueError if there are no examples or the batch does not divide among the processes.
    """
    if not 1 <= n <= 1 << 31:
        raise ValueError(f"{n=}: there must be between 1 and 2**31 examples to train on")
    if global_batch < 1 or global_batch % process_count:
        raise ValueError(f"{global_batch=} is not divisible by {process_count=}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=} is not in [0, {process_count})")
    if workers < 0:
        raise ValueError(f"{workers=} must not be negative")
    b = global_batch // process_count
    part = slice(process_index * b, (process_index + 1) * b)
    steps = grain.MapDataset.range(sys.maxsize // global_batch).seed(seed)
    batches = steps.random_map(_Fetch(gather, n, global_batch, seed, part))[start_step:]
    if not workers:
        # The default would buffer 500 whole batches.
        return iter(batches.to_iter_dataset(grain.ReadOptions(1, prefetch_buffer_size=4)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, parsed or not
    options = grain.multiprocessing.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    stream = batches.to_iter_dataset(grain.ReadOptions(0, 0))
    return iter(stream.mp_prefetch(options, worker_init_fn=_start_worker))


def _start_worker(index: int, count: int) -> None:
    """Leaves all signals to the parent, which needs batches up to the step after which it saves."""
    del index, count
    exits.end_with_parent(signal.SIGINT, signal.SIGTERM)


def prefetch(batches: Iterable[Batch], put: Callable[[Batch], Any], ahead: int = 2) -> Iterator:
    """Yields ``put(batch)`` of every batch, ``ahead`` of them begun before they are asked for.

    ``put`` starts the transfer to the devices and returns at once, as jax's transfers do; so the
    next batches travel while a step computes.
    """
    waiting = collections.deque()
    for batch in batches:
        waiting.append(put(batch))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def evenly(num_rows: int, max_rows: int) -> np.ndarray:
    """Returns the int64 numbers of at most ``max_rows`` rows, evenly over a set sorted by class."""
    return np.linspace(0, num_rows - 1, min(num_rows, max_rows)).astype(np.int64)
