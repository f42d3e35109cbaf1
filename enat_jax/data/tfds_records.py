"""A TFDS data set that is prepared as ArrayRecord as a source of images, without TensorFlow."""

import copy
import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from enat_jax.data import decoding, imagenet, layout
from enat_jax.runtime import exits, os_errors

PREFIX = "tfds:"
_NAME = re.compile(r"tfds:(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_ADVICE = (
    "ImageNet is prepared by python -m enat_jax.prepare, other sets in Python by "
    "tfds.builder({name!r}, file_format='array_record', data_dir=...).download_and_prepare(), for "
    "which most of them need TensorFlow this one time"
)


@dataclasses.dataclass(eq=False)
class Records:
    """A split of a TFDS data set as a source of images; see ``images.Source``.

    Args:
        source: "tfds:NAME", with "/CONFIG" or ":VERSION" or both behind it; without a version the
            latest one is taken.
        split: TFDS's, slices such as "train[:10%]" included.
        framing: of each picture.
        data_dir: where TFDS keeps its data; None: TFDS's default.
        image_key: name of the feature that holds the picture.
        label_key: name of the feature that holds the label; a set without any feature of this kind
            is of one class.

    Raises:
        ValueError: the set is not there, not prepared as ArrayRecord or not complete, or lacks the
            split or the features.
    """

    ignored: ClassVar[dict[str, int]] = {}
    missing: ClassVar[dict[str, int]] = {}

    source: str
    split: str
    framing: decoding.Framing
    data_dir: str | os.PathLike | None = None
    image_key: str = "image"
    label_key: str = "label"

    def __post_init__(self) -> None:
        import tensorflow_datasets as tfds  # slow to import

        for name in ("image_key", "label_key", "data_dir"):
            value = getattr(self, name)
            if not isinstance(value or "", (str, os.PathLike)):
                raise ValueError(f"{name}={value!r} is not a text")
        if self.data_dir:
            self.data_dir = os.path.abspath(os.path.expanduser(self.data_dir))
        self._directory = _find(self.source, self.data_dir)
        try:
            self._builder = tfds.builder_from_directory(self._directory)
        except Exception as error:  # of TFDS and of protocol buffers, whatever damage they find
            os_errors.pass_on(error, self._directory)
            raise ValueError(
                f"the description of the data set in {self._directory} is damaged "
                f"({exits.one_line(error)}): copy it again or prepare it again"
            ) from error
        features = self._builder.info.features
        image, label = tfds.features.Image, tfds.features.ClassLabel
        # A set without classes, such as coco_captions, is of one class.
        self._labelled = self.label_key != "label" or any(
            name == "label" or isinstance(feature, label) for name, feature in features.items()
        )
        needed = ((self.image_key, image), (self.label_key, label))
        for key, kind in needed if self._labelled else needed[:1]:
            if key not in features or not isinstance(features[key], kind):
                found = {name: type(feature).__name__ for name, feature in features.items()}
                raise ValueError(
                    f"{self._directory} has no {kind.__name__} feature {key!r}: set image_key and "
                    f"label_key to some of {found}"
                )
        self.class_names = (
            imagenet.readable_names(features[self.label_key].names)
            if self._labelled
            else (layout.ONLY_CLASS,)
        )
        self.image_shape = self.framing.shape
        self._check_split()
        try:
            # Encoded as they are: we decode pictures ourselves, and alike from every source.
            decoders = {self.image_key: tfds.decode.SkipDecoding()}
            self._data = self._builder.as_data_source(self.split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"{self._directory} is prepared as {self._builder.info.file_format.value}, which "
                f"TensorFlow alone can read: prepare it as array_record ({_advice(self.source)})"
            ) from error

        self._kept = np.arange(len(self._data))

    def __reduce__(self) -> tuple[type["Records"], tuple[Any, ...], dict[str, Any]]:
        # Files are opened anew.
        fields = tuple(getattr(self, field.name) for field in dataclasses.fields(self))
        return Records, fields, {"_kept": self._kept}

    def _check_split(self) -> None:
        splits = self._builder.info.splits
        try:
            found = splits[self.split]
            number, instructions = found.num_examples, found.file_instructions
        except (KeyError, ValueError, AssertionError) as error:
            raise ValueError(
                f"{self._directory} has no split {self.split!r}: it has {sorted(splits)}, and "
                "slices of them such as 'train[:10%]'"
            ) from error
        if not number:
            raise ValueError(f"{self._directory}: split {self.split!r} has no pictures")
        # Each of them stays open once it was read.
        os_errors.allow_open_files(len(instructions), self._directory)
        for instruction in instructions:
            if not pathlib.Path(instruction.filename).is_file():
                raise ValueError(
                    f"{self._directory} is not complete, {instruction.filename} is missing: copy "
                    "it again or prepare it again"
                )

    @property
    def mirrored(self) -> bool:
        """Whether a mirrored picture still belongs to its class, as the setting ``flip`` says."""
        return self.framing.flip

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, index: int) -> str:
        return f"{self.split}[{self._kept[decoding.checked(index, len(self))]}]"

    def load(self, index: int, seed: int | None = None) -> decoding.Example:
        key, label, data = self._read(index)
        with decoding.naming(key, self.key(index)):
            pixels = self.framing.pixels(data, seed)
        return decoding.Example(pixels, label, key)

    def check(self, index: int) -> None:
        """See ``scan.Scannable``, as for the next two."""
        key, _, data = self._read(index)
        with decoding.naming(key, self.key(index)):
            self.framing.check(data)

    def listing(self) -> list[tuple[str, int, int]]:
        return [(self.key(i), 0, 0) for i in range(len(self))]  # only reading tells size and label

    def without(self, keys: Collection[str]) -> "Records":
        found = copy.copy(self)
        kept = [self.key(i) not in keys for i in range(len(self))]
        found._kept = self._kept[np.array(kept, bool)]
        return found

    def _read(self, index: int) -> tuple[str, int, bytes]:
        """Returns the key, the label and the encoded picture of a record."""
        key, record = self._record(index)
        label = int(record[self.label_key]) if self._labelled else 0
        if not 0 <= label < len(self.class_names):
            raise decoding.UnreadableImage(
                key, f"has no class: its label is {label}", self.key(index)
            )
        return key, label, record[self.image_key]

    def feature(self, name: str) -> Iterator[tuple[str, Any]]:
        """Yields of every record the key and the values of a feature such as "captions/text".

        Raises:
            ValueError: there is no such feature, or a record cannot be read.
        """
        features, inner = self._builder.info.features, name.split("/")
        names = [name] if name in features else inner
        if names[0] not in features:
            raise ValueError(f"{self._directory} has no feature {name!r}: it has {list(features)}")
        for index in range(len(self)):
            key, values = self._record(index)
            try:
                for part in names:
                    values = values[part]
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{self._directory}: {key} has no feature {name!r}") from error
            yield key, values

    def _record(self, index: int) -> tuple[str, Any]:
        """Returns the key and the features of a record."""
        key = self.key(index)
        try:
            record = self._data[int(self._kept[index])]
        except Exception as error:  # of ArrayRecord and of TFDS, whatever damage they find
            os_errors.pass_on(error, self._directory)
            raise decoding.UnreadableImage(
                key, f"its record in {self._directory} cannot be read ({error})"
            ) from error
        if name := record.get("file_name") or record.get("image/filename"):
            key = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
        return key, record

    def gather(
        self, indices: Int[np.ndarray, " b"], seeds: Int[np.ndarray, " b"] | None = None
    ) -> decoding.Batch:
        return decoding.gather(self.load, self.image_shape, indices, seeds)

    def identity(self) -> dict[str, object]:
        info = self._builder.info
        return {
            "source": f"tfds:{info.full_name}",  # name, config, version
            "split": self.split,
            "image_key": self.image_key,
            "label_key": self.label_key,
            **self.framing.identity(),
            "num_examples": len(self),
            "bytes": int(info.dataset_size),
            **({} if len(self) == len(self._data) else {"kept": self._digest()}),
        }

    def _digest(self) -> str:
        return hashlib.sha256(self._kept.astype("<i8").tobytes()).hexdigest()


def _find(source: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Returns the directory of a prepared data set, NAME[/CONFIG]/VERSION below ``data_dir``."""
    import tensorflow_datasets as tfds

    match = _NAME.fullmatch(source)
    if not match:
        raise ValueError(f"{source=} is not tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:VERSION")
    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR)
    folder = root / match["name"]
    if match["config"]:
        folder /= match["config"]
    elif not _versions(folder):
        # A set of one configuration leaves no choice.
        configs = [path for path in _folders(folder) if _versions(path)]
        if len(configs) > 1:
            names = [f"{PREFIX}{match['name']}/{path.name}" for path in configs]
            raise ValueError(f"{source=} has several configurations in {root}: choose of {names}")
        folder = configs[0] if configs else folder
    versions = _versions(folder)
    version = match["version"] or (versions[-1] if versions else None)
    if version not in versions:
        others = f"; there are the versions {versions}" if versions else ""
        raise ValueError(
            f"there is no prepared data set for {source=} in {root}{others}: set data_dir, or "
            f"prepare the data ({_advice(source)})"
        )
    return folder / version


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _versions(folder: pathlib.Path) -> list[str]:
    """Returns the names of prepared versions, the latest one last."""
    names = [
        path.name
        for path in _folders(folder)
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    ]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")])


def _advice(source: str) -> str:
    return _ADVICE.format(name=source.removeprefix(PREFIX))
