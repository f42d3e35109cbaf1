"""Passes of the evaluation program: progress for people, and stops that lose nothing."""

import contextlib
import dataclasses
import pathlib
import signal
import threading
from collections.abc import Iterator

import numpy as np

from enat_jax.evaluation import accumulate, features, image_sets, statistics
from enat_jax.runtime import cli, exits, progress


@dataclasses.dataclass(frozen=True)
class Hosts:
    """This host, how many share the work, and how many seconds may pass until it saves."""

    index: int
    number: int
    save_every: float


def run_passes(
    subject: image_sets.ImageSet,
    network: features.Features,
    directory: pathlib.Path,
    hosts: Hosts,
    name: str,
) -> accumulate.Collected | None:
    """This host's part of a pass, and what all found; None: others have not finished.

    Raises:
        cli.Stop: on request, after saving.
        KeyboardInterrupt: asked a second time, before that.
        OSError, ValueError: as ``accumulate.run``.
    """
    first, end = subject.plan.share(hosts.index, hosts.number)
    bars: list[progress.Progress] = []
    done = 0

    def tell(now: int) -> None:
        nonlocal done
        done = now
        if not bars and now < end - first:
            bars.append(progress.Progress(end - first, 1, now, unit=f"image ({name})"))
        elif bars:
            bars[0].update(now)

    try:
        with _terminated_as_interrupted():
            accumulate.run(
                subject.load,
                network,
                subject.plan,
                directory,
                host_index=hosts.index,
                num_hosts=hosts.number,
                read_ahead=subject.read_ahead,
                progress=tell,
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
    return accumulate.collect(subject.plan, directory, hosts.number)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within, SIGTERM is KeyboardInterrupt, as Ctrl-C is."""
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
    """Its statistics, made if need be and kept as OUT/reference.npz; None: hosts are not done."""
    if reference.statistics is not None:
        return _with_features_of_images(reference, network)
    path = out / "reference.npz"
    if path.exists():
        return statistics.Statistics.load(path)
    collected = run_passes(reference.images, network, out / "reference", hosts, "reference")
    if collected is None:
        return None
    made = reference.images.statistics(collected)
    made.save(path)
    return made


def _with_features_of_images(
    reference: image_sets.Reference, network: features.Features
) -> statistics.Statistics:
    """Of the images that ADM's files hold beside their statistics, for precision and recall."""
    found = reference.statistics
    number = found.description.get("sample_images")
    if found.pool is not None or not number:
        return found
    pool = []
    with progress.Progress(number, 1, unit="image (of the reference)") as bar:
        for images in statistics.sample_images(reference.path, accumulate.CHUNK):
            pool.append(network(images)["pool"])
            bar.update(sum(map(len, pool)))
    return dataclasses.replace(found, pool=np.concatenate(pool))
