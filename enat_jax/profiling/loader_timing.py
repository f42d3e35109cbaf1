"""The loader and its file format, timed on records of random tokens."""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import grain
import numpy as np
from array_record.python import array_record_module

from enat_jax.data import loader, records, tokens
from enat_jax.runtime import memory

MIN_SECONDS = 1.0  # of one timing
PER_FILE = 4096  # records of an ArrayRecord file; more make its random reads slower


def make_tokens(directory: pathlib.Path, num_records: int, num_tokens: int) -> tokens.TokenSet:
    """Makes a token set of random tokens, 1024 codes and 1000 classes."""
    side = round(num_tokens**0.5)
    plan = tokens.TokenSetSpec(
        num_images=num_records,
        copies=1,
        flips=False,
        batch_size=1,
        grid=(side, num_tokens // side),
        codebook_size=1024,
        class_names=tuple(str(i) for i in range(1000)),
        tokenizer="random",
        preprocessing={},
        location={},
    )
    for shard in tokens.begin(directory, plan):
        items = plan.items(shard)
        rng = np.random.default_rng(shard)
        rows = np.zeros(len(items), plan.dtype)
        rows["tokens"] = rng.integers(0, 1024, rows["tokens"].shape)
        rows["label"], rows["image"] = rng.integers(0, 1000, len(items)), items
        tokens.write_shard(directory, plan, shard, rows, [], [])
    tokens.finish(directory, plan)
    return tokens.TokenSet.open(directory)


@dataclasses.dataclass(frozen=True)
class LoaderMeasurement:
    """The loader over one token set.

    Attributes:
        num_records: of the set.
        num_bytes: of its record files.
        rates: examples per second, one entry a repeat.
        memory: MiB, the largest resident set of the process that read and did nothing else.
    """

    num_records: int
    num_bytes: int
    rates: tuple[float, ...]
    memory: float

    @property
    def examples_per_second(self) -> tuple[float, float, float]:
        """Median, least and largest."""
        return statistics.median(self.rates), min(self.rates), max(self.rates)


def time_loader(
    directory: pathlib.Path, batch_size: int, repeats: int, workers: int = 0
) -> LoaderMeasurement:
    """Times shuffled batches of the token set in ``directory``, as training gets them.

    This happens in a process of its own, whose memory is that of reading alone.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        arguments = directory, batch_size, repeats, workers, MIN_SECONDS
        return pool.submit(_time_loader, *arguments).result()


def _time_loader(
    directory: pathlib.Path, batch_size: int, repeats: int, workers: int, seconds: float
) -> LoaderMeasurement:
    token_set = tokens.TokenSet.open(directory)
    batches = loader.train_batches(token_set, batch_size, seed=0, workers=workers)
    next(batches)  # what is read ahead must not count as read in no time
    rates = tuple(_rate(batches, batch_size, seconds) for _ in range(repeats))
    record = records.dtype(token_set.grid[0] * token_set.grid[1], token_set.codebook_size)
    return LoaderMeasurement(
        len(token_set), len(token_set) * record.itemsize, rates, memory.resident_peak() / 2**20
    )


def compare_formats(
    token_set: tokens.TokenSet, directory: pathlib.Path, batch_size: int, repeats: int
) -> dict[str, tuple[float, ...]]:
    """Returns records per second of batches at random indices, of one set in several formats.

    ``directory`` receives the copies. The formats take turns, so that a busy machine is busy for
    all of them.
    """
    paths = []
    for start in range(0, len(token_set), PER_FILE):
        rows = token_set.rows[np.arange(start, min(start + PER_FILE, len(token_set)))]
        paths.append(directory / f"{start:09d}")
        np.save(f"{paths[-1]}.npy", rows)
        # Group size 1: records are read one by one.
        writer = array_record_module.ArrayRecordWriter(
            f"{paths[-1]}.array_record", "group_size:1,uncompressed"
        )
        for row in rows:
            writer.write(row.tobytes())
        writer.close()
    maps = [np.load(f"{path}.npy", mmap_mode="r") for path in paths]
    source = grain.sources.ArrayRecordDataSource([f"{path}.array_record" for path in paths])
    rng = np.random.default_rng(0)

    def batches(read: Callable[[np.ndarray], object]) -> Iterator[object]:
        while True:
            yield read(rng.integers(0, len(token_set), batch_size))

    readers = {
        "ours: .npy, pread": batches(lambda indices: token_set.rows[indices]),
        ".npy, memory map": batches(lambda indices: _from_maps(maps, indices)),
        "ArrayRecord": batches(lambda indices: source.__getitems__(indices.tolist())),
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for name in itertools.chain.from_iterable([readers] * repeats):
        rates[name].append(_rate(readers[name], batch_size, MIN_SECONDS))
    return {name: tuple(found) for name, found in rates.items()}


def _from_maps(maps: list[np.ndarray], indices: np.ndarray) -> np.ndarray:
    files, rows = np.divmod(indices, PER_FILE)
    out = np.empty(len(indices), maps[0].dtype)
    for file in np.unique(files):
        out[files == file] = maps[file][rows[files == file]]
    return out


def _rate(batches: Iterator[object], batch_size: int, least: float) -> float:
    """Returns examples per second, over at least that many seconds."""
    start, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < least:
        next(batches)
        count += batch_size
    return count / seconds
