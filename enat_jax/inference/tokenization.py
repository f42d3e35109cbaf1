"""Tokenization: images to shards of token records, decoding overlapped with the devices' work."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, Shaped, UInt8

from enat_jax.data import decoding, image_data, images, loader, tokens
from enat_jax.inference import tokenizer
from enat_jax.runtime import numerics, progress, sharding

SEED = 0  # of augmented copies

Read = decoding.Example | decoding.UnreadableImage


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

    A source of the kind that it was trained on has those of its training; another one its size, and
    is mirrored if that one was.

    Raises:
        ValueError: the tokenizer does not take square images.
    """
    flip = {}
    if trained_with := model.provenance.get("config", {}).get("data"):
        data = image_data.Data.of(trained_with)
        if images.kind(data.source) == images.kind(source):
            return dict(data.settings)
        flip = {name: value for name, value in data.settings.items() if name == "flip"}
    if source in images.MADE_HERE:
        return {}
    height, width = model.image_size
    if height != width:
        raise ValueError(f"the tokenizer takes {height}x{width} pixels, which is no square")
    return {"size": height, "channels": model.model.image_channels} | flip


def advice(source: str, shape: tuple[int, ...], needed: tuple[int, ...]) -> str:
    """Returns what gives pictures of a source the shape ``[h, w, c]`` that is needed."""
    differ = {"size": (shape[0], needed[0]), "channels": (shape[2], needed[2])}
    options = {name: need for name, (found, need) in differ.items() if found != need}
    if lacking := options.keys() - images.SETTINGS[images.kind(source)]:
        return f"name other pictures, {source} has no setting {min(lacking)}"
    wanted = " and ".join(f"--set {name}={need}" for name, need in options.items())
    return f"{wanted} changes that"


def tokenize(
    model: tokenizer.Tokenizer,
    source: images.Source,
    spec: tokens.TokenSetSpec,
    directory: pathlib.Path,
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
    times, begun = Times(), time.perf_counter()
    total = sum(len(spec.items(s)) for s in todo)
    with (
        contextlib.closing(_encoded(model, source, spec, todo, times)) as encoded,
        progress.Progress(total, 1, unit="image") as bar,
    ):
        for shard in todo:
            items = spec.items(shard)
            rows = [np.zeros(0, spec.dtype)]
            keys: dict[int, str] = {}
            skipped: dict[int, dict[str, Any]] = {}
            found = itertools.islice(encoded, len(items))
            for item, (read, codes) in zip(items, found, strict=True):  # never a silent gap
                image = item // spec.copies
                keys[image] = read.key
                if isinstance(read, decoding.Example):
                    rows.append(_records(spec, image, read.label, codes))
                elif skip_errors:
                    skipped[image] = {"image": image, "key": read.key, "reason": read.reason}
                else:
                    raise read
                times.num_images += 1
                bar.update(times.num_images)
            start = time.perf_counter()
            tokens.write_shard(
                directory,
                spec,
                shard,
                np.concatenate(rows),
                list(keys.values()),
                list(skipped.values()),
            )
            times.writing += time.perf_counter() - start
    times.total = time.perf_counter() - begun
    return times


def _records(
    spec: tokens.TokenSetSpec, image: int, label: int, codes: Int[np.ndarray, "views l"]
) -> Shaped[np.ndarray, " views"]:
    rows = np.zeros(spec.views, spec.dtype)
    rows["tokens"], rows["flip"] = codes, np.arange(spec.views)
    rows["label"], rows["image"] = label, image
    return rows


def _encoded(
    model: tokenizer.Tokenizer,
    source: images.Source,
    spec: tokens.TokenSetSpec,
    todo: list[int],
    times: Times,
) -> Generator[tuple[Read, Int[np.ndarray, "views l"]]]:
    """Yields what was read of each item of the shards, and its tokens.

    Threads read the items ahead of their use, since decoding does without the GIL. The tokens of
    an item that could not be read have no meaning.
    """
    mesh = sharding.make_mesh(sharding.Sharding(), jax.local_devices())
    encode = _encoder(model, spec, mesh)
    size = spec.batch_size * mesh.size
    groups = [
        items[i : i + spec.batch_size]  # what one device gets at a time
        for items in map(spec.items, todo)
        for i in range(0, len(items), spec.batch_size)
    ]
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    reads = loader.prefetch(
        itertools.chain.from_iterable(groups),
        lambda item: pool.submit(_read, source, spec, item),
        ahead=2 * size,
    )

    def batches() -> Iterator[tuple[list[Read | None], UInt8[np.ndarray, "b h w c"]]]:
        for first in range(0, len(groups), mesh.size):
            start = time.perf_counter()
            batch = np.zeros((size, *source.image_shape), np.uint8)
            found: list[Read | None] = [None] * size  # None where the batch is padded
            for g, group in enumerate(groups[first : first + mesh.size]):
                for place in range(g * spec.batch_size, g * spec.batch_size + len(group)):
                    read = found[place] = next(reads).result()
                    if isinstance(read, decoding.Example):
                        batch[place] = read.image
            times.pictures += time.perf_counter() - start
            yield found, batch

    try:
        for found, on_devices in loader.prefetch(
            batches(), lambda batch: (batch[0], encode(batch[1])), ahead=1
        ):
            start = time.perf_counter()
            codes = np.asarray(on_devices)
            times.tokenizer += time.perf_counter() - start
            for read, of_item in zip(found, codes, strict=True):
                if read is not None:
                    yield read, of_item
    finally:
        pool.shutdown(cancel_futures=True)


def _read(source: images.Source, spec: tokens.TokenSetSpec, item: int) -> Read:
    image, copy = divmod(item, spec.copies)
    seed = int(np.random.default_rng([SEED, copy, image]).integers(1 << 63)) if copy else None
    try:
        example = source.load(image, seed)
    except decoding.UnreadableImage as error:
        return error
    if not 0 <= example.label < len(spec.class_names):
        n = len(spec.class_names)
        raise ValueError(f"{example.key}: label {example.label} is not one of the {n} classes")
    return example


def _encoder(
    model: tokenizer.Tokenizer, spec: tokens.TokenSetSpec, mesh: jax.sharding.Mesh
) -> Callable[[UInt8[np.ndarray, "b h w c"]], Int[Array, "b views l"]]:
    """Returns what turns images into tokens, over all devices of the mesh."""
    params = jax.device_put(model.params, sharding.replicated(mesh))

    @numerics.jit(out_shardings=sharding.of_batch(mesh))
    def encode(params: PyTree, batch: UInt8[Array, "b h w c"]) -> Int[Array, "b views l"]:
        views = [batch, batch[:, :, ::-1]][: spec.views]
        found = [tokenizer.encode(model.model, params, view) for view in views]
        return jnp.stack(found, 1).astype(spec.dtype["tokens"].base)

    return lambda batch: encode(params, jax.device_put(batch, sharding.of_batch(mesh)))
