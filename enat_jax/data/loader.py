"""The Grain pipeline: an endless, exactly resumable stream of shuffled batches.

The position in the stream is the step and nothing else: batch k depends on (seed, k) alone, so a
run is resumed by `start_step`, and a global batch is the same however many processes share it.
"""

from collections.abc import Callable, Iterator

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class _Gather(grain.transforms.RandomMap):
    """From the indices of a global batch to this process's part of it."""

    def __init__(self, gather: Callable[[np.ndarray, np.ndarray], Batch], part: slice):
        self._gather = gather
        self._part = part

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> Batch:
        # Seeds are drawn for the global batch and then cut, or they would depend on the hosts.
        seeds = rng.integers(0, 1 << 63, len(element))
        return self._gather(np.asarray(element)[self._part], seeds[self._part])


def train_batches(
    gather: Callable[[np.ndarray, np.ndarray], Batch],
    n: int,
    global_batch: int,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields this process's part of the batches from `start_step` on, without end.

    `gather(indices [b], seeds [b]) -> batch` fetches examples out of `n`; each epoch is a new
    shuffle, and an epoch's last examples share a batch with the next one's first. Indices are read
    in a batch, which is many times faster than one by one.

    Raises ValueError if there are no examples or the batch does not divide among the processes.
    """
    if n < 1:
        raise ValueError(f"{n=}: there are no examples to train on")
    if global_batch < 1 or global_batch % process_count:
        raise ValueError(f"{global_batch=} is not divisible by {process_count=}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=} is not in [0, {process_count})")
    b = global_batch // process_count
    part = slice(process_index * b, (process_index + 1) * b)
    # repeat() before batch(), or the tail of every epoch would be dropped.
    dataset = (
        grain.MapDataset.range(n)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(global_batch, drop_remainder=True)
        .random_map(_Gather(gather, part))
    )
    # The default would buffer 500 whole batches.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(dataset[start_step:].to_iter_dataset(options))
