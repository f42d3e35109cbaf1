"""Tokenization: images to shards of token records, decoding overlapped with the devices' work."""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, UInt8

from enat_jax.data import decoding, image_data, images, tokens
from enat_jax.inference import tokenizer
from enat_jax.runtime import progress, sharding

SEED = 0  # of augmented copies

Read = decoding.Example | decoding.UnreadableImage
Item = tuple[int, int, Read]  # shard, item, what was read


@dataclasses.dataclass
class Times:
    """Seconds that the main loop spent waiting, and pictures it got through."""

    pictures: float = 0.0  # waiting for pictures to be read, decoded and cropped
    tokenizer: float = 0.0  # waiting for the devices
    writing: float = 0.0
    total: float = 0.0
    num_images: int = 0

    def __str__(self) -> str:
        share = {
            "the tokenizer": self.tokenizer,
            "reading and decoding": self.pictures,
            "writing": self.writing,
        }
        parts = [f"{100 * v / max(self.total, 1e-9):.1f}% on {k}" for k, v in share.items()]
        rate = self.num_images / max(self.total, 1e-9)
        return f"{self.total:.1f} s, {rate:.1f} images/s; waited {', '.join(parts)}"


def source_settings(model: tokenizer.Tokenizer, source: str) -> dict[str, Any]:
    """Returns settings for ``images.open_source`` with which the tokenizer can take ``source``.

    A source of the kind that it was trained on has those of its training; another one its size.

    Raises:
        ValueError: the tokenizer does not take square images.
    """
    if trained_with := model.provenance.get("config", {}).get("data"):
        data = image_data.Data.of(trained_with)
        if images.kind(data.source) == images.kind(source):
            return dict(data.settings)
    if source == "digits":
        return {}
    height, width = model.image_size
    if height != width:
        raise ValueError(f"the tokenizer takes {height}x{width} pixels, which is no square")
    return {"size": height, "channels": model.model.image_channels}


def tokenize(
    model: tokenizer.Tokenizer,
    source: images.Source,
    spec: tokens.TokenSetSpec,
    directory: pathlib.Path,
    *,
    skip_errors: bool = False,
    host_index: int = 0,
    num_hosts: int = 1,
) -> Times:
    """Makes the unfinished shards of this host: shard s belongs to host s % num_hosts.

    Copy 0 of an image is the image as it is; the others are augmented by a seed that depends on
    image and copy alone. Every device gets whole batches of ``spec.batch_size``, always the same
    ones in the same shape, so that no token depends on the number of devices or hosts.

    Finished shards stay, whatever happens.

    Raises:
        decoding.UnreadableImage: an image cannot be read, unless ``skip_errors``.
        ValueError: ``directory`` holds something else.
        OSError: it cannot be written.
    """
    todo = [s for s in tokens.begin(directory, spec) if s % num_hosts == host_index]
    mesh = sharding.make_mesh(sharding.Sharding(), jax.local_devices())
    encode = _encoder(model, spec, mesh)
    times, begun = Times(), time.perf_counter()
    shards = _Shards(spec, directory, times)
    total = sum(len(spec.items(s)) for s in todo)
    # Results on their way from the devices.
    waiting: collections.deque[tuple[list[Item | None], jax.Array]] = collections.deque()
    with (
        _Loader(source, spec, todo, skip_errors) as loader,
        progress.Progress(total, 1, unit="image") as bar,
    ):

        def collect() -> None:
            items, on_devices = waiting.popleft()
            start = time.perf_counter()
            found = np.asarray(on_devices)
            times.tokenizer += time.perf_counter() - start
            shards.add(items, found)
            times.num_images += sum(item is not None for item in items)
            bar.update(times.num_images)

        try:
            for items, batch in _batches(loader, source, spec, todo, len(mesh.devices.flat), times):
                waiting.append((items, encode(batch)))
                if len(waiting) > 1:
                    collect()
        except decoding.UnreadableImage:
            # What the devices have done is not lost to it. After another error it is: a batch may
            # have been added in part.
            while waiting:
                collect()
            raise
        while waiting:
            collect()
    times.total = time.perf_counter() - begun
    return times


def _encoder(
    model: tokenizer.Tokenizer, spec: tokens.TokenSetSpec, mesh: jax.sharding.Mesh
) -> Callable[[UInt8[np.ndarray, "b h w c"]], Int[Array, "b views l"]]:
    """Returns what turns images into tokens, over all devices of the mesh."""
    params = jax.device_put(model.params, sharding.replicated(mesh))

    @functools.partial(jax.jit, out_shardings=sharding.of_batch(mesh))
    def encode(params: PyTree, batch: UInt8[Array, "b h w c"]) -> Int[Array, "b views l"]:
        views = [batch, batch[:, :, ::-1]][: spec.views]
        found = [tokenizer.encode(model.model, params, view) for view in views]
        return jnp.stack(found, 1).astype(spec.dtype["tokens"].base)

    return lambda batch: encode(params, jax.device_put(batch, sharding.of_batch(mesh)))


class _Loader:
    """Reads the items of shards ahead of their use, in threads: decoding does without the GIL."""

    def __init__(
        self, source: images.Source, spec: tokens.TokenSetSpec, todo: list[int], skip: bool
    ) -> None:
        self._source = source
        self._spec = spec
        self._skip = skip
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        self._items = itertools.chain.from_iterable(spec.items(s) for s in todo)
        self._futures: collections.deque[concurrent.futures.Future[Read]] = collections.deque()

    def __enter__(self) -> "_Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def next(self, ahead: int) -> Read:
        """Returns the next item; ``ahead`` more are kept on their way."""
        for item in itertools.islice(self._items, ahead + 1 - len(self._futures)):
            self._futures.append(self._pool.submit(self._load, item))
        return self._futures.popleft().result()

    def _load(self, item: int) -> Read:
        image, copy = divmod(item, self._spec.copies)
        seed = None
        if copy:
            seed = int(np.random.default_rng([SEED, copy, image]).integers(1 << 63))
        try:
            example = self._source.load(image, seed)
        except decoding.UnreadableImage as error:
            if self._skip:
                return error
            raise
        if not 0 <= example.label < len(self._spec.class_names):
            raise ValueError(
                f"{example.key}: label {example.label} is not one of the "
                f"{len(self._spec.class_names)} classes"
            )
        return example


def _batches(
    loader: _Loader,
    source: images.Source,
    spec: tokens.TokenSetSpec,
    todo: list[int],
    num_devices: int,
    times: Times,
) -> Iterator[tuple[list[Item | None], np.ndarray]]:
    """Yields the items of a batch, None where it is padded, and its images, uint8 [b, h, w, c]."""
    groups = [
        [(shard, item) for item in items[i : i + spec.batch_size]]
        for shard in todo
        for items in [spec.items(shard)]
        for i in range(0, len(items), spec.batch_size)
    ]
    size = spec.batch_size * num_devices
    for first in range(0, len(groups), num_devices):
        start = time.perf_counter()
        batch = np.zeros((size, *source.image_shape), np.uint8)
        items: list[Item | None] = [None] * size
        for g, group in enumerate(groups[first : first + num_devices]):
            for place, (shard, item) in enumerate(group, g * spec.batch_size):
                found = loader.next(ahead=2 * size)
                items[place] = shard, item, found
                if isinstance(found, decoding.Example):
                    batch[place] = found.image
        times.pictures += time.perf_counter() - start
        yield items, batch


class _Shards:
    """Collects the records of shards and writes each when it is complete."""

    def __init__(self, spec: tokens.TokenSetSpec, directory: pathlib.Path, times: Times) -> None:
        self._spec = spec
        self._directory = directory
        self._times = times
        self._rows: dict[int, list[np.ndarray]] = collections.defaultdict(list)
        self._keys: dict[int, dict[int, str]] = collections.defaultdict(dict)
        self._skipped: dict[int, dict[int, dict]] = collections.defaultdict(dict)

    def add(self, items: list[Item | None], found: np.ndarray) -> None:
        """Takes a batch: its items and their tokens [b, views, l]."""
        for entry, codes in zip(items, found, strict=True):
            if entry is None:
                continue
            shard, item, example = entry
            image = item // self._spec.copies
            self._keys[shard][image] = example.key
            if isinstance(example, decoding.UnreadableImage):
                reason = {"image": image, "key": example.key, "reason": example.reason}
                self._skipped[shard][image] = reason
            else:
                rows = np.zeros(self._spec.views, self._spec.dtype)
                rows["tokens"], rows["flip"] = codes, np.arange(self._spec.views)
                rows["label"], rows["image"] = example.label, image
                self._rows[shard].append(rows)
            if item == self._spec.items(shard)[-1]:
                self._write(shard)

    def _write(self, shard: int) -> None:
        start = time.perf_counter()
        rows = self._rows.pop(shard, None) or [np.zeros(0, self._spec.dtype)]
        keys, items = self._keys.pop(shard), self._spec.items(shard)
        if len(keys) != items[-1] // self._spec.copies - items[0] // self._spec.copies + 1:
            raise RuntimeError(f"images of shard {shard} were lost")  # never a silent gap
        tokens.write_shard(
            self._directory,
            self._spec,
            shard,
            np.concatenate(rows),
            list(keys.values()),
            list(self._skipped.pop(shard, {}).values()),
        )
        self._times.writing += time.perf_counter() - start
