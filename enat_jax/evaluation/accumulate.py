"""Images through a feature network into statistics: in one pass, resumable, over devices and hosts.

Images are numbered from 0 and pass in chunks of one size, whose limits depend neither on devices
nor on hosts. Of every chunk the moments of the features enter float64 sums, and some features are
kept, in files whose rows are written in place. What has been summed is saved every minute, whole or
not at all; what was killed goes on with the chunk after it and ends with the same bits.

Host i of n takes the i-th of n runs of chunks. Hosts do not talk to each other: each has a folder
of its own below a directory that they share, and ``collect`` merges the sums in the order of hosts.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from enat_jax.evaluation import features
from enat_jax.evaluation import statistics as image_statistics
from enat_jax.metrics import moments
from enat_jax.runtime import files

CHUNK = 256  # images; a multiple of what feature networks take in a batch
SAVE_EVERY_S = 60.0
STATE = "state.npz"


class Batch(NamedTuple):
    """Some images in a row."""

    images: np.ndarray  # uint8 [b, h, w, c]
    labels: np.ndarray  # int [b], 0 <= label < number of classes
    rows: Mapping[str, np.ndarray] = {}  # more numbers of each image that are kept: float32 [b, d]


Load = Callable[[int, int], Batch]  # images start to stop - 1


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """What passes through the features.

    Attributes:
        num_images: at least 1; num_classes: of the labels.
        keep: most images whose pool features are kept: every n-th, so that they are spread evenly.
        identity: JSON values of all that decides images and features, to refuse going on with
            something else.
        chunk: images of a chunk.
    """

    num_images: int
    num_classes: int
    keep: int
    identity: dict[str, Any]
    chunk: int = CHUNK

    @property
    def stride(self) -> int:
        """The pool features of every image whose number is a multiple of it are kept."""
        return max(1, -(-self.num_images // self.keep))

    def share(self, host_index: int, num_hosts: int) -> tuple[int, int]:
        """The images of a host, first and one past the last: the i-th of n runs of chunks."""
        chunks = -(-self.num_images // self.chunk)
        first, end = (chunks * i // num_hosts * self.chunk for i in (host_index, host_index + 1))
        return min(first, self.num_images), min(end, self.num_images)

    def kept(self, start: int, stop: int) -> slice:
        """Those of the images start to stop - 1 whose pool features are kept."""
        return slice(-start % self.stride, stop - start, self.stride)


@dataclasses.dataclass(frozen=True)
class Totals:
    """What has passed: moments by the name of the feature, images of each class [c], seconds."""

    moments: dict[str, moments.Moments]
    class_counts: np.ndarray
    seconds: dict[str, float]  # "images": making or reading them; "features"

    @classmethod
    def empty(cls, num_classes: int) -> "Totals":
        return cls({}, np.zeros(num_classes, np.int64), {"images": 0.0, "features": 0.0})

    @property
    def num_images(self) -> int:
        return int(self.class_counts.sum())

    def add(self, found: Mapping[str, np.ndarray], labels: np.ndarray) -> "Totals":
        """With one more chunk, float32 [b, d] of "pool" and perhaps "spatial"."""
        sums = dict(self.moments)
        for name in ("pool", "spatial"):
            if name in found:
                before = sums.get(name) or moments.Moments.empty(found[name].shape[1])
                sums[name] = before.add(found[name])
        counts = self.class_counts + np.bincount(labels, minlength=len(self.class_counts))
        return dataclasses.replace(self, moments=sums, class_counts=counts)

    def merge(self, other: "Totals") -> "Totals":
        """Of both together; of two hosts, whose seconds are added up."""
        if not self.moments or not other.moments:  # a host without images
            return self if self.moments else other
        return Totals(
            {name: value.merge(other.moments[name]) for name, value in self.moments.items()},
            self.class_counts + other.class_counts,
            {name: value + other.seconds[name] for name, value in self.seconds.items()},
        )


@dataclasses.dataclass(frozen=True)
class Collected:
    """All that is known of the images of a plan.

    Attributes:
        totals: moments and counts.
        rows: what was kept, float32 [k, d] by name: "pool" (every ``stride``-th image),
            "probabilities" if the features have them, and the rows of batches.
    """

    totals: Totals
    rows: dict[str, np.ndarray]

    def statistics(self, description: Mapping[str, Any]) -> image_statistics.Statistics:
        """As they are saved and compared; ``description`` says what was measured."""
        return image_statistics.Statistics(
            moments=self.totals.moments, pool=self.rows["pool"], description=dict(description)
        )


def host_directory(directory: pathlib.Path, host_index: int, num_hosts: int) -> pathlib.Path:
    """The folder that only this host writes to."""
    return directory / f"{host_index:05d}-of-{num_hosts:05d}"


# --- one pass ------------------------------------------------------------------------------------


def run(
    load: Load,
    network: features.Features,
    plan: PassSpec,
    directory: pathlib.Path,
    *,
    host_index: int = 0,
    num_hosts: int = 1,
    read_ahead: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    save_every: float = SAVE_EVERY_S,
) -> None:
    """Pass this host's images through the features, from where an earlier call was stopped.

    Args:
        load: makes or reads images; it must give the same ones again when it is asked again.
        network: the features.
        plan: what passes.
        directory: shared by all hosts.
        host_index, num_hosts: this host, and how many there are.
        read_ahead: whether ``load`` is called in a thread, one chunk ahead: for reading files.
        progress: called with the number of images that this host has done, after each chunk.
        save_every: seconds.

    Raises:
        KeyboardInterrupt: as it came, after saving.
        OSError: a file cannot be written; what was saved before stays.
        ValueError: features are not finite; another process is at work.
    """
    directory = host_directory(directory, host_index, num_hosts)
    with files.lock_directory(directory), contextlib.ExitStack() as held:
        first, end = plan.share(host_index, num_hosts)
        totals = _read_state(directory / STATE, plan) or Totals.empty(plan.num_classes)
        done, saved, row_files = first + totals.num_images, time.monotonic(), {}
        ranges = _ranges(plan, done, end)
        progress(done - first)

        def save() -> None:
            for file in row_files.values():
                file.sync()  # before the state that counts on them
            sizes = {name: file.num_bytes for name, file in row_files.items()}
            _write_state(directory / STATE, plan, totals, sizes)

        unsaved = False
        try:
            for start, stop, batch, waited in _batches(load, ranges, read_ahead):
                begun = time.perf_counter()
                found = network(batch.images)
                _check(found, start, stop)
                for name, rows in _kept(found, batch, plan, start, stop).items():
                    if name not in row_files:
                        total = _num_rows(name, plan, first, end)
                        file = files.Rows(directory / f"{name}.npy", total, rows.shape[1])
                        row_files[name] = held.enter_context(file)
                    row_files[name].write(_num_rows(name, plan, first, start), rows)
                added = totals.add(found, batch.labels)
                spent = {
                    "images": totals.seconds["images"] + waited,
                    "features": totals.seconds["features"] + time.perf_counter() - begun,
                }
                totals, unsaved = dataclasses.replace(added, seconds=spent), True
                progress(stop - first)
                if time.monotonic() - saved >= save_every:
                    save()
                    saved, unsaved = time.monotonic(), False
        except KeyboardInterrupt:
            if unsaved:
                save()
            raise
        if unsaved or not (directory / STATE).exists():
            save()


def in_memory(
    load: Load, network: features.Features, plan: PassSpec, *, read_ahead: bool = False
) -> Collected:
    """The same in one go, for few images: what ``run`` and ``collect`` give, without files."""
    totals, kept = Totals.empty(plan.num_classes), {}
    ranges = _ranges(plan, 0, plan.num_images)
    for start, stop, batch, _ in _batches(load, ranges, read_ahead):
        found = network(batch.images)
        _check(found, start, stop)
        for name, rows in _kept(found, batch, plan, start, stop).items():
            kept.setdefault(name, []).append(rows)
        totals = totals.add(found, batch.labels)
    return Collected(totals, {name: np.concatenate(rows) for name, rows in kept.items()})


def collect(plan: PassSpec, directory: pathlib.Path, num_hosts: int = 1) -> Collected | None:
    """What all hosts found, merged in their order; None: not all of them have finished."""
    parts = []
    for i in range(num_hosts):
        folder = host_directory(directory, i, num_hosts)
        first, end = plan.share(i, num_hosts)
        totals = _read_state(folder / STATE, plan)
        if totals is None or totals.num_images < end - first:
            return None
        if totals.num_images:
            names = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
            parts.append((totals, names))
    totals = Totals.empty(plan.num_classes)
    for part, _ in parts:
        totals = totals.merge(part)
    rows = {name: [names[name] for _, names in parts] for name in sorted(parts[0][1])}
    # A single host's rows stay on disk until they are used.
    joined = {k: v[0] if len(v) == 1 else np.concatenate(v) for k, v in rows.items()}
    return Collected(totals, joined)


def _ranges(plan: PassSpec, first: int, end: int) -> list[tuple[int, int]]:
    return [(i, min(i + plan.chunk, end)) for i in range(first, end, plan.chunk)]


def _batches(load: Load, ranges, read_ahead: bool) -> Iterator[tuple[int, int, Batch, float]]:
    """Start, stop, images and the seconds that were spent on waiting for them."""
    if not read_ahead:
        for start, stop in ranges:
            begun = time.perf_counter()
            batch = load(start, stop)
            yield start, stop, batch, time.perf_counter() - begun
        return
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(load, *at) for at in ranges[:1]]
        for i, (start, stop) in enumerate(ranges):
            waiting += [pool.submit(load, *at) for at in ranges[i + 1 : i + 2]]
            begun = time.perf_counter()
            batch = waiting.pop(0).result()
            yield start, stop, batch, time.perf_counter() - begun


def _check(found: Mapping[str, np.ndarray], start: int, stop: int) -> None:
    for name, rows in found.items():
        if not np.isfinite(rows).all():
            raise ValueError(
                f"{name} features of images {start} to {stop - 1} are not finite: the weights of "
                "the feature network are damaged, or do not suit these images"
            )


def _kept(found, batch: Batch, plan: PassSpec, start: int, stop: int) -> dict[str, np.ndarray]:
    rows = {"pool": found["pool"][plan.kept(start, stop)], **batch.rows}
    if "probabilities" in found:
        rows["probabilities"] = found["probabilities"]
    return rows


def _num_rows(name: str, plan: PassSpec, first: int, end: int) -> int:
    """How many rows of a name the images first to end - 1 have."""
    if name != "pool":
        return end - first
    return -(-end // plan.stride) - -(-first // plan.stride)


# --- what has been summed, in a file --------------------------------------------------------------


def _write_state(
    path: pathlib.Path, plan: PassSpec, totals: Totals, sizes: Mapping[str, int]
) -> None:
    """``sizes``: bytes of the files of rows, by name."""
    arrays = {"class_counts": totals.class_counts}
    for name, value in totals.moments.items():
        arrays |= {f"{name}/{key}": array for key, array in value.arrays().items()}
    about = {"plan": dataclasses.asdict(plan), "seconds": totals.seconds, "files": dict(sizes)}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    files.write_npz(path, arrays)


def _read_state(path: pathlib.Path, plan: PassSpec) -> Totals | None:
    """None if there is none.

    Raises:
        ValueError: it is damaged, or of another plan, or a file of rows beside it is.
    """
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            counts = arrays["class_counts"]
            found: dict[str, dict[str, np.ndarray]] = {}
            for key in arrays.files:
                name, _, part = key.partition("/")
                if part:
                    found.setdefault(name, {})[part] = arrays[key]
        sums = {name: moments.Moments.from_arrays(parts) for name, parts in found.items()}
        seconds, before, sizes = about["seconds"], about["plan"], dict(about["files"])
    except Exception as error:  # whatever a damaged archive makes of itself
        raise ValueError(
            f"{path} is damaged ({error}): remove the folder {path.parent} to begin it anew"
        ) from error
    if files.differences(before, files.as_json(dataclasses.asdict(plan))):
        raise ValueError(f"{path} is of another evaluation: name another --out")
    for name, size in sizes.items():
        rows = path.with_name(f"{name}.npy")
        # Made anew, it would hold zeros for the images that have passed.
        if not rows.is_file() or rows.stat().st_size != size:
            raise ValueError(
                f"{rows} is missing or damaged: remove the folder {path.parent} to begin it anew"
            )
    return Totals(sums, counts, seconds)


def begin(
    directory: pathlib.Path, settings: Mapping[str, Any], advice: str = "name another --out"
) -> None:
    """Claim a directory for an evaluation, or find it claimed by the same.

    Several processes may do so at once. ``advice``: what to do if it holds something else.

    Raises:
        ValueError: it holds something else; the message says what differs.
        OSError: it cannot be written.
    """
    path = directory / "plan.json"
    settings = files.as_json(settings)  # as they are read again: no tuples
    # Looked at first: another host may claim it in between.
    occupied = directory.is_dir() and any(not x.name.startswith(".") for x in directory.iterdir())
    if path.exists():
        before = files.read_json(path, advice)
        if found := sorted(files.differences(before, settings), key=lambda found: found[0]):
            name, was, now = found[0]
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ValueError(
                f"{directory} holds an evaluation with other settings: {name} is {was}, now it "
                f"would be {now}{more}: {advice}"
            )
        return
    if occupied:
        raise ValueError(f"{directory} holds something else already: {advice}")
    files.write_json(path, settings)
