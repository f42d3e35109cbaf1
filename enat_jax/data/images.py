"""Sources of labelled images: what they offer, and how to open one by its name."""

import copy
import dataclasses
import hashlib
import inspect
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from enat_jax.data import decoding, layout, readers, scenes, tfds_records
from enat_jax.data.decoding import Batch, Example, UnreadableImage
from enat_jax.data.digits import Digits
from enat_jax.runtime import paths

__all__ = ["Batch", "Digits", "Example", "Files", "Source", "UnreadableImage", "open_source"]

KINDS = (
    "a source is 'digits', 'scenes', 'tfds:NAME' (a TFDS data set prepared as array_record), or "
    "the path of a folder, a .zip file or an uncompressed .tar file of pictures"
)
OTHER_SPLITS = "pictures of other splits"  # as a reason for not using files


class Source(Protocol):
    """Labelled pictures of one size, numbered from 0. Safe to use in threads, and picklable.

    ``seed``, an integer that is not negative, decides the augmentation of an example alone, so that
    it depends neither on its batch nor on its host; None: not augmented.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by label."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of all images."""

    @property
    def mirrored(self) -> bool:
        """Whether a mirrored picture still belongs to its class, as the setting ``flip`` says."""

    @property
    def ignored(self) -> dict[str, int]:
        """Number of files that are not used, by extension ("" for none) or another reason."""

    @property
    def missing(self) -> dict[str, int]:
        """Number of images that ``sample`` was to draw and did not, by folder, "" for the root."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Returns a unique name of a picture for people; reads nothing.

        It is a path below the folder, a member of the archive, TFDS's "train[123]" or "digits/17".
        """

    def load(self, index: int, seed: int | None = None) -> Example:
        """Returns one example; its key is ``key(index)``, or the file name that a record holds.

        Raises:
            UnreadableImage: the picture cannot be read.
            IndexError: ``index`` is not in [0, n).
        """

    def gather(
        self, indices: Int[np.ndarray, " b"], seeds: Int[np.ndarray, " b"] | None = None
    ) -> Batch:
        """Returns {"images": uint8 ``[b, h, w, c]``, "labels": int32 ``[b]``}.

        Raises:
            UnreadableImage: a picture cannot be read; the message says what to do about it.
        """

    def identity(self) -> dict[str, object]:
        """Returns JSON values that decide images and labels; the same wherever the data lie."""


class Files:
    """Pictures in files below a folder or in an archive, as a ``Source``.

    Args:
        path: of the folder or archive.
        reader: of its files.
        split: of the pictures; see ``layout.arrange``, also for the errors.
        framing: of each picture.
        classes: see ``layout.arrange``.
        class_names: see ``layout.arrange``.
        held_out: see ``layout.arrange``.
        splits: see ``layout.arrange``.
        class_order: see ``layout.arrange``.
    """

    def __init__(
        self,
        path: pathlib.Path,
        reader: readers.Reader,
        split: str,
        framing: decoding.Framing,
        *,
        classes: str = "first",
        class_names: str | None = None,
        held_out: float = 0.0,
        splits: str = "folders",
        class_order: str = "numeric",
    ) -> None:
        found = layout.arrange(
            reader.keys,
            reader.folders,
            split,
            where=path,
            packed=reader.packed,
            classes=classes,
            class_names=class_names,
            held_out=held_out,
            splits=splits,
            class_order=class_order,
        )
        self._reader, self._framing = reader, framing
        self._rows, self.labels = found.rows, found.labels
        self._settings = {"split": split, "classes": classes, "held_out": float(held_out)}
        self._settings |= found.new
        self.class_names = found.class_names
        self.image_shape = framing.shape
        self.mirrored = framing.flip
        others = {OTHER_SPLITS: n} if (n := len(reader.keys) - len(found.rows)) else {}
        self.ignored = reader.ignored | others
        self.missing = reader.missing

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return self._reader.keys[self._rows[decoding.checked(index, len(self))]]

    def load(self, index: int, seed: int | None = None) -> Example:
        key = self.key(index)
        data = self._reader.read(self._rows[index])
        with decoding.naming(key):
            pixels = self._framing.pixels(data, seed)
        return Example(pixels, int(self.labels[index]), key)

    def check(self, index: int) -> None:
        """See ``scan.Scannable``, as for the next two."""
        data = self._reader.read(self._rows[index])
        with decoding.naming(self.key(index)):
            self._framing.check(data)

    def listing(self) -> list[tuple[str, int, int]]:
        rows = zip(self._rows, self.labels, strict=True)
        return [(self._reader.keys[i], int(self._reader.sizes[i]), int(y)) for i, y in rows]

    def without(self, keys: Collection[str]) -> "Files":
        kept = np.array([self._reader.keys[i] not in keys for i in self._rows], bool)
        found = copy.copy(self)
        found._rows, found.labels = self._rows[kept], self.labels[kept]
        for lost in np.setdiff1d(self.labels, found.labels):
            raise ValueError(f"class {self.class_names[lost]!r} has no picture that can be read")
        return found

    def gather(
        self, indices: Int[np.ndarray, " b"], seeds: Int[np.ndarray, " b"] | None = None
    ) -> Batch:
        return decoding.gather(self.load, self.image_shape, indices, seeds)

    def identity(self) -> dict[str, object]:
        listing = hashlib.sha256()
        for key, size, label in self.listing():
            # No key holds a zero byte, so no two listings read the same.
            listing.update(f"{key}\0{label} {size}\0".encode())
        return {
            "source": "files",
            **self._settings,
            **self._framing.identity(),
            "num_images": len(self),
            "listing": listing.hexdigest(),
        }


def describe_unused(ignored: Mapping[str, int]) -> str:
    """Returns one line on the files of a source that are not used, "" if there are none.

    Args:
        ignored: their number by reason; see ``Source``.
    """
    found = [f"{why or 'without extension'} ({n:,})" for why, n in sorted(ignored.items()) if n > 0]
    return f"files that are not used: {', '.join(found)}" if found else ""


# Sources that are made of what an installed package has, so that they have no path.
MADE_HERE: dict[str, Callable[..., Source]] = {"digits": Digits, "scenes": scenes.Scenes}


def _settings(*classes: type) -> dict[str, inspect.Parameter]:
    """Returns what classes take, by name, but for where the pictures are."""
    found = {k: v for x in classes for k, v in inspect.signature(x).parameters.items()}
    others = ("source", "path", "reader", "split", "framing")
    return {k: v for k, v in found.items() if k not in others}


# Settings of each kind of source.
SETTINGS = {
    "digits": _settings(Digits),
    "scenes": _settings(scenes.Scenes),
    "tfds": _settings(decoding.Framing, tfds_records.Records),
    "files": _settings(decoding.Framing, Files),
}


def kind(source: str) -> str:
    """Returns "digits", "scenes", "tfds" or "files"; sources of a kind have the same settings."""
    if source in MADE_HERE:
        return source
    return "tfds" if source.startswith(tfds_records.PREFIX) else "files"


def open_source(source: str, split: str, **settings: Any) -> Source:
    """Opens the source of a config's data section.

    ``source`` is one of
        "digits": ``Digits``, splits "train" and "test".
        "scenes": ``scenes.Scenes``, splits "train", "test" and "unseen".
        "tfds:NAME", "tfds:NAME/CONFIG", "tfds:NAME:VERSION": ``tfds_records.Records``, splits as in
            TFDS, such as "train", "validation", "train[:10%]".
        the path of a folder, a .zip file or an uncompressed .tar file: ``Files``, splits "train",
            "test", "all" and the names of split folders.
    ``settings`` are those of the class, and for pictures of any size those of ``decoding.Framing``,
    of which ``size`` must be given; a value of None is one that is not given.

    Raises:
        ValueError: the source, the split or a setting is unknown, or the class refuses it.
        OSError: files cannot be listed or opened.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    found, path = kind(source), paths.local(source)
    reader = readers.kind(path) if found == "files" else None
    if found == "files" and reader is None:
        reason = "is none of these" if path.exists() else "does not exist"
        raise ValueError(f"{source=} {reason}: {KINDS}")
    if unknown := sorted(set(settings) - set(SETTINGS[found])):
        raise ValueError(
            f"{source=} has no settings {unknown}: it has {sorted(SETTINGS[found])}; set the "
            "others to None"
        )
    if found in MADE_HERE:
        return MADE_HERE[found](split=split, **settings)
    if "size" not in settings:
        raise ValueError(f"{source=} needs a setting size, the pixels of a side of its images")
    names = settings.keys() & {field.name for field in dataclasses.fields(decoding.Framing)}
    framing = decoding.Framing(**{name: settings.pop(name) for name in names})
    if reader is None:
        return tfds_records.Records(source, split, framing, **settings)
    return Files(path, reader(path), split, framing, **settings)


# Settings by which the rules of this version are those of earlier ones.
_EARLIER: tuple[dict[str, Any], ...] = ({"class_order": "text"}, {"splits": "none"})


def open_again(location: Mapping[str, Any], identity: Mapping[str, Any]) -> Source:
    """Opens the source whose ``identity`` an earlier version may have written down.

    Args:
        location: the arguments of ``open_source`` at that time.
        identity: of the source.

    Raises:
        ValueError: it is another one now, or cannot be opened.
        OSError: files cannot be listed or opened.
    """
    rules = (
        [{}, *_EARLIER, _EARLIER[0] | _EARLIER[1]] if kind(location["source"]) == "files" else [{}]
    )
    failure = None
    for rule in rules:
        try:
            source = open_source(**rule | dict(location))
        except ValueError as error:
            failure = error if rule == {} else failure
            continue
        if source.identity() == identity:
            return source
    raise failure or ValueError(f"{location['source']} has changed since")
