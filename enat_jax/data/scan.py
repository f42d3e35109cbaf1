"""Finds pictures that cannot be read before they are needed: all are decoded once, in threads."""

import concurrent.futures
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol, Self, runtime_checkable

from enat_jax.data import images
from enat_jax.runtime import progress

_CHUNK = 32  # pictures that a thread takes at a time
_NAMED = 3  # pictures that a message names


@runtime_checkable
class Scannable(images.Source, Protocol):
    """A source some of whose pictures may not be readable."""

    def check(self, index: int) -> None:
        """Raises UnreadableImage if ``load`` would; faster than that."""

    def listing(self) -> list[tuple[str, int, int]]:
        """Returns key, bytes and label of each picture: what shows that the data are others."""

    def without(self, keys: Collection[str]) -> Self:
        """Returns the source that it would be if some of its pictures were not there.

        Raises:
            ValueError: a class has no others.
        """


Picture = tuple[Scannable, int]  # a source and an index in it


def scan(pictures: Sequence[Picture]) -> Iterator[dict[str, str | None]]:
    """Decodes pictures and shows how far it is.

    Yields:
        By key, in the order of the pictures and some at a time: why a picture cannot be read; None:
        it can.

    Raises:
        OSError: pictures cannot be read for a reason that is not theirs.
    """
    chunks = [pictures[i : i + _CHUNK] for i in range(0, len(pictures), _CHUNK)]
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    done = 0
    try:
        with progress.Progress(len(pictures), 1, unit="picture") as bar:
            for found in pool.map(_check, chunks):
                done += len(found)
                bar.update(done)
                yield found
    finally:
        pool.shutdown(cancel_futures=True)


def _check(pictures: Sequence[Picture]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for source, index in pictures:
        key = source.key(index)
        try:
            source.check(index)
            found[key] = None
        except images.UnreadableImage as error:
            found[key] = error.reason if error.key == key else f"{error.key} {error.reason}"
    return found


def readable(source: images.Source, say: Callable[[str], None]) -> images.Source:
    """Returns a source without the pictures that cannot be read, and says which these are."""
    if not isinstance(source, Scannable):
        return source
    found = (x for part in scan([(source, i) for i in range(len(source))]) for x in part.items())
    bad = {key: reason for key, reason in found if reason is not None}
    if bad:
        say(f"left out: {describe(bad, len(source))}")
    return source.without(bad) if bad else source


def describe(bad: Mapping[str, str], total: int) -> str:
    """Returns in one line how many of ``total`` pictures cannot be read, and the first of them."""
    named = [str(images.UnreadableImage(*item)) for item in list(bad.items())[:_NAMED]]
    more = [f"and {len(bad) - _NAMED:,} more"] if len(bad) > _NAMED else []
    return f"{len(bad):,} of {total:,} pictures cannot be read: {'; '.join([*named, *more])}"
