"""Passes of images through a feature network: resumable, over devices and hosts.

Of every chunk of images the moments of the features enter float64 sums, and some features are kept,
in files whose rows are written in place. What has been summed is saved every minute, whole or not
at all; what was killed goes on with the chunk after it and ends with the same bits. Hosts do not
talk to each other: each has a folder of its own below a directory that they share, and ``collect``
merges the sums in the order of hosts.
"""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from enat_jax.evaluation import accumulate, features, image_sets, statistics
from enat_jax.evaluation.accumulate import Collected, PassSpec, Totals
from enat_jax.runtime import cli, exits, files, numerics
from enat_jax.runtime import progress as progress_bar

SAVE_EVERY_S = 60.0
STATE = "state.npz"
PLAN = "plan.json"  # written first

Network = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # such as ``features.Features``


def claim(
    directory: pathlib.Path, settings: Mapping[str, Any], advice: str = "name another --out"
) -> None:
    """Claims a directory for an evaluation, or finds it claimed by the same one.

    Several processes may do so at once.

    Args:
        directory: of the evaluation; it is created if missing.
        settings: JSON values that decide what it holds, beside ``numerics.choices``.
        advice: what to do if it holds something else.

    Raises:
        OSError: if it cannot be written.
        ValueError: if it holds something else; the message says what differs.
    """
    path = directory / PLAN
    # As they are read again: no tuples.
    settings = files.as_json({**settings, **numerics.recorded()})
    # Looked at first: another host may claim it in between.
    occupied = directory.is_dir() and any(not x.name.startswith(".") for x in directory.iterdir())
    if path.exists():
        before = files.read_json(path, advice)
        plans = [numerics.with_all(plan) for plan in (before, settings)]
        if found := sorted(files.differences(*plans), key=lambda found: found[0]):
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


def host_directory(directory: pathlib.Path, host_index: int, num_hosts: int) -> pathlib.Path:
    """Returns the folder that only this host writes to."""
    return directory / f"{host_index:05d}-of-{num_hosts:05d}"


def run(
    load: accumulate.Load,
    network: Network,
    spec: PassSpec,
    directory: pathlib.Path,
    *,
    host_index: int = 0,
    num_hosts: int = 1,
    read_ahead: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    save_every: float = SAVE_EVERY_S,
) -> None:
    """Passes this host's images through the features, from where an earlier call was stopped.

    Args:
        load: makes or reads images; it must give the same ones again when it is asked again.
        network: the features.
        spec: what passes.
        directory: shared by all hosts.
        host_index: of this host.
        num_hosts: how many hosts there are.
        read_ahead: whether ``load`` is called in a thread, one chunk ahead: for reading files.
        progress: called with the number of images that this host has done, after each chunk.
        save_every: seconds.

    Raises:
        KeyboardInterrupt: as it came, after saving.
        OSError: if a file cannot be written; what was saved before stays.
        ValueError: if features are not finite, or another process is at work.
    """
    directory = host_directory(directory, host_index, num_hosts)
    with files.lock_directory(directory), contextlib.ExitStack() as held:
        first, end = spec.share(host_index, num_hosts)
        totals = Totals.load(directory / STATE, spec) or Totals.empty(spec.num_classes)
        done, saved = first + totals.num_images, time.monotonic()
        row_files: dict[str, files.Rows] = {}
        progress(done - first)

        def save() -> None:
            for file in row_files.values():
                file.sync()  # before the state that counts on them
            sizes = {name: file.num_bytes for name, file in row_files.items()}
            totals.save(directory / STATE, spec, sizes)

        unsaved = False
        try:
            for start, stop, batch, waited in _batches(load, spec.chunks(done, end), read_ahead):
                begun = time.perf_counter()
                found = network(batch.images)
                _check(found, start, stop)
                for name, rows in spec.kept_rows(found, batch, start, stop).items():
                    if name not in row_files:
                        total = spec.num_rows(name, first, end)
                        file = files.Rows(directory / f"{name}.npy", total, rows.shape[1])
                        row_files[name] = held.enter_context(file)
                    row_files[name].write(spec.num_rows(name, first, start), rows)
                added = totals.add(found, batch.labels)
                totals, unsaved = added.spend(waited, time.perf_counter() - begun), True
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
    load: accumulate.Load, network: features.Features, spec: PassSpec, *, read_ahead: bool = False
) -> Collected:
    """Returns what ``run`` and ``collect`` give, in one go and without files: for few images."""
    totals = Totals.empty(spec.num_classes)
    kept: dict[str, list[np.ndarray]] = {}
    for start, stop, batch, _ in _batches(load, spec.chunks(0, spec.num_images), read_ahead):
        found = network(batch.images)
        _check(found, start, stop)
        for name, rows in spec.kept_rows(found, batch, start, stop).items():
            kept.setdefault(name, []).append(rows)
        totals = totals.add(found, batch.labels)
    return Collected(totals, {name: np.concatenate(rows) for name, rows in kept.items()})


def collect(spec: PassSpec, directory: pathlib.Path, num_hosts: int = 1) -> Collected | None:
    """Returns what all hosts found, merged in their order; None if one has not finished."""
    parts = []
    for i in range(num_hosts):
        folder = host_directory(directory, i, num_hosts)
        first, end = spec.share(i, num_hosts)
        found = Totals.load(folder / STATE, spec)
        if found is None or found.num_images < end - first:
            return None
        if found.num_images:
            names = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
            parts.append((found, names))
    totals = Totals.empty(spec.num_classes)
    for part, _ in parts:
        totals = totals.merge(part)
    rows = {name: [names[name] for _, names in parts] for name in sorted(parts[0][1])}
    # A single host's rows stay on disk until they are used.
    joined = {k: v[0] if len(v) == 1 else np.concatenate(v) for k, v in rows.items()}
    return Collected(totals, joined)


def _batches(
    load: accumulate.Load, ranges: list[tuple[int, int]], read_ahead: bool
) -> Iterator[tuple[int, int, accumulate.Batch, float]]:
    """Yields start, stop, images and the seconds that were spent on waiting for them."""
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
    """Raises ValueError, which names the images, if features are not finite."""
    for name, rows in found.items():
        if not np.isfinite(rows).all():
            raise ValueError(
                f"{name} features of images {start} to {stop - 1} are not finite: the weights of "
                "the feature network are damaged, or do not suit these images"
            )


# --- of a program: progress for people, and stops that lose nothing -------------------------------


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the hosts share the work.

    Attributes:
        index: of this host.
        number: of hosts.
        save_every: seconds that may pass until this host saves.
    """

    index: int
    number: int
    save_every: float


def run_and_collect(
    subject: image_sets.ImageSet,
    network: Network,
    directory: pathlib.Path,
    hosts: Hosts,
    name: str,
) -> Collected | None:
    """Runs this host's part of a pass, with a progress bar, and returns what all hosts found.

    Args:
        subject: the images.
        network: the features.
        directory: shared by all hosts.
        hosts: how they share the work.
        name: of the images, for people.

    Returns:
        What was found; None if other hosts have not finished.

    Raises:
        cli.Stop: on request, by Ctrl-C or SIGTERM, after saving.
        KeyboardInterrupt: if asked a second time, before that.
        OSError: as ``run``.
        ValueError: as ``run``.
    """
    first, end = subject.spec.share(hosts.index, hosts.number)
    bars: list[progress_bar.Progress] = []
    done = 0

    def show(now: int) -> None:
        nonlocal done
        done = now
        if not bars and now < end - first:
            bars.append(progress_bar.Progress(end - first, 1, now, unit=f"image ({name})"))
        elif bars:
            bars[0].update(now)

    try:
        with _terminated_as_interrupted():
            run(
                subject.load,
                network,
                subject.spec,
                directory,
                host_index=hosts.index,
                num_hosts=hosts.number,
                read_ahead=subject.read_ahead,
                progress=show,
                save_every=hosts.save_every,
            )
    except KeyboardInterrupt as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise  # the second, perhaps before all was saved
        raise cli.Stop(
            f"saved after {done} of {end - first} images ({name}); start the same command again to "
            "go on",
            exits.STOPPED,
        ) from error
    finally:
        for bar in bars:
            bar.close()
    return collect(subject.spec, directory, hosts.number)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def statistics_of_reference(
    reference: image_sets.Reference, network: features.Features, out: pathlib.Path, hosts: Hosts
) -> statistics.Statistics | None:
    """Returns the statistics of a reference, made if need be and kept as OUT/reference.npz.

    None if other hosts have not finished making them.
    """
    if isinstance(reference.content, statistics.Statistics):
        return _with_features_of_images(reference.content, reference.path, network)
    path = out / "reference.npz"
    if path.exists():
        return statistics.load_own(path, f"remove {path}, and it is made again")
    images = reference.content
    collected = run_and_collect(images, network, out / "reference", hosts, "reference")
    if collected is None:
        return None
    made = images.statistics(collected)
    made.save(path)
    return made


def _with_features_of_images(
    found: statistics.Statistics, path: str, network: features.Features
) -> statistics.Statistics:
    """Adds the features of images that ADM's files hold, which precision and recall need."""
    number = found.description.get("sample_images")
    if found.pool is not None or not number:
        return found
    pool: list[np.ndarray] = []
    with progress_bar.Progress(number, 1, unit="image (of the reference)") as bar:
        for images in statistics.sample_images(path, accumulate.CHUNK):
            pool.append(network(images)["pool"])
            bar.update(sum(map(len, pool)))
    return dataclasses.replace(found, pool=np.concatenate(pool))
