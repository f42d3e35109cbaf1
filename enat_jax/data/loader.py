"""Endless, exactly resumable streams of shuffled batches, made by Grain.

The position in the stream is the step and nothing else. The order of an epoch depends on
(seed, epoch) alone, so a run is resumed by ``start_step``, with any number of workers, and a global
batch is the same however many processes share it.
"""

import collections
import dataclasses
import functools
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from enat_jax.data.decoding import Batch
from enat_jax.runtime import exits

Taken = TypeVar("Taken")
Placed = TypeVar("Placed")


def shuffled(start: int, count: int, n: int, seed: int) -> Int[np.ndarray, " count"]:
    """Returns what stands at ``start`` to ``start + count`` in an endless row of shuffled epochs.

    Every epoch is a permutation of its own, computed place by place: nothing grows with ``n``.

    Args:
        start: the first place.
        count: number of places.
        n: number of examples, 1 to 2**31.
        seed: of all permutations.

    Returns:
        Examples in [0, n), int64.
    """

    @functools.cache
    def key(epoch: int) -> int:
        return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])

    def example(position: int) -> int:
        epoch, place = divmod(position, n)
        return grain.experimental.index_shuffle(place, max_index=n - 1, seed=key(epoch), rounds=4)

    return np.fromiter(map(example, range(start, start + count)), np.int64, count)


class Examples(Protocol):
    """What can be trained on: a token set or a source of images."""

    def __len__(self) -> int: ...

    def gather(
        self, indices: Int[np.ndarray, " b"], seeds: Int[np.ndarray, " b"] | None = None
    ) -> Batch:
        """Returns a whole batch, which is many times faster than fetching single examples."""


@dataclasses.dataclass(frozen=True)
class _Fetch(grain.transforms.RandomMap):
    """Maps a step to this process's part of its global batch."""

    examples: Examples
    size: int
    seed: int
    part: slice

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        # Seeds are drawn for the global batch and then cut, or they would depend on the hosts.
        seeds = rng.integers(0, 1 << 63, self.size)[self.part]
        first = int(element) * self.size + self.part.start
        indices = shuffled(first, self.part.stop - self.part.start, len(self.examples), self.seed)
        return self.examples.gather(indices, seeds)


def train_batches(
    examples: Examples,
    global_batch: int,
    *,
    seed: int,
    start_step: int = 0,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> Iterator[Batch]:
    """Yields this process's part of the batches from ``start_step`` on, without end.

    Each epoch is a new shuffle, and an epoch's last examples share a batch with the next one's
    first.

    Args:
        examples: that the batches are taken from.
        global_batch: examples of a batch of all processes together.
        seed: of the order and the augmentation.
        start_step: number of the first batch.
        share: (i, n), part i of n of every batch; see ``sharding.process_share``.
        workers: other processes that gather, for which ``examples`` must be picklable; 0: a thread
            of this one does. The batches are the same.

    Raises:
        ValueError: there are no examples, or the batch does not divide among the processes.
    """
    n = len(examples)
    process_index, process_count = share
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
    batches = steps.random_map(_Fetch(examples, global_batch, seed, part))[start_step:]
    if not workers:
        # The default would buffer 500 whole batches.
        return iter(batches.to_iter_dataset(grain.ReadOptions(1, prefetch_buffer_size=4)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, parsed or not
    options = grain.multiprocessing.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    stream = batches.to_iter_dataset(grain.ReadOptions(0, 0))
    stream = stream.mp_prefetch(options, worker_init_fn=_start_worker)
    # Through pipes: of processes that are killed together, shared memory would stay behind.
    pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    return iter(grain.experimental.WithOptionsIterDataset(stream, pipes))


def _start_worker(index: int, count: int) -> None:
    """Leaves all signals to the parent, which needs batches up to the step after which it saves."""
    del index, count
    exits.end_with_parent(signal.SIGINT, signal.SIGTERM)


def prefetch(
    batches: Iterable[Taken], put: Callable[[Taken], Placed], ahead: int = 2
) -> Iterator[Placed]:
    """Yields ``put(batch)`` of every batch, ``ahead`` of them begun before they are asked for.

    ``put`` starts work and returns at once, as jax's transfers to the devices do; so the next
    batches travel while a step computes.
    """
    waiting: collections.deque[Placed] = collections.deque()
    for batch in batches:
        waiting.append(put(batch))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
